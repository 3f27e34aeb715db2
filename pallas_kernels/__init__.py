"""GPU kernels, arrays in and arrays out: they know nothing of optimizers and import none."""

from pallas_kernels._dual_step_config import DualLayout as DualLayout
from pallas_kernels._dual_step_config import DualStepConfig as DualStepConfig
from pallas_kernels._dual_step_config import dual_step_config as dual_step_config
from pallas_kernels._dual_step_launch import DualStepResult as DualStepResult
from pallas_kernels._dual_step_launch import dual_step as dual_step
from pallas_kernels._exact_step_config import ExactLayout as ExactLayout
from pallas_kernels._exact_step_config import exact_step_config as exact_step_config
from pallas_kernels._exact_step_launch import ExactLeaf as ExactLeaf
from pallas_kernels._exact_step_launch import exact_steps as exact_steps
from pallas_kernels._launch import FLOATS as FLOATS
from pallas_kernels._launch import SplitWeight as SplitWeight
from pallas_kernels._launch import StepScalars as StepScalars
from pallas_kernels._shared_step_config import SharedLayout as SharedLayout
from pallas_kernels._shared_step_config import SharedStepConfig as SharedStepConfig
from pallas_kernels._shared_step_config import shared_step_config as shared_step_config
from pallas_kernels._shared_step_launch import SharedStepResult as SharedStepResult
from pallas_kernels._shared_step_launch import SharedTables as SharedTables
from pallas_kernels._shared_step_launch import shared_step as shared_step
from pallas_kernels._triton import is_available as is_available
