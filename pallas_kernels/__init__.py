"""GPU kernels, arrays in and arrays out: they know nothing of optimizers and import none."""

from pallas_kernels._dual_step_config import DualLayout as DualLayout
from pallas_kernels._dual_step_config import DualStepConfig as DualStepConfig
from pallas_kernels._dual_step_config import dual_step_config as dual_step_config
from pallas_kernels._dual_step_launch import DualScalars as DualScalars
from pallas_kernels._dual_step_launch import DualStepResult as DualStepResult
from pallas_kernels._dual_step_launch import SplitWeight as SplitWeight
from pallas_kernels._dual_step_launch import dual_step as dual_step
from pallas_kernels._triton import is_available as is_available
