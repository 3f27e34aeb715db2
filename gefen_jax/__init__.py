"""Gefen for JAX: Adam from about one byte of optimizer state per parameter."""

from importlib.metadata import version as _version

from gefen_jax._alias import gefen as gefen
from gefen_jax._calibrate import calibrate as calibrate
from gefen_jax._dual_code import DualCode as DualCode
from gefen_jax._exact import Exact as Exact
from gefen_jax._fingerprint import check_fingerprint as check_fingerprint
from gefen_jax._fingerprint import fingerprint as fingerprint
from gefen_jax._flash import ScaleByFlashAdamState as ScaleByFlashAdamState
from gefen_jax._flash import ScaleByFlashMomentumState as ScaleByFlashMomentumState
from gefen_jax._flash import scale_by_flash_adam as scale_by_flash_adam
from gefen_jax._flash import scale_by_flash_lion as scale_by_flash_lion
from gefen_jax._flash import scale_by_flash_momentum as scale_by_flash_momentum
from gefen_jax._flash_alias import flash_adam as flash_adam
from gefen_jax._flash_alias import flash_adamw as flash_adamw
from gefen_jax._flash_alias import flash_lion as flash_lion
from gefen_jax._flash_alias import flash_sgd as flash_sgd
from gefen_jax._flat_periods import FlatPeriods as FlatPeriods
from gefen_jax._from_adam import from_adam as from_adam
from gefen_jax._from_adam import to_adam as to_adam
from gefen_jax._fused import FusedGefen as FusedGefen
from gefen_jax._fused import fused_gefen as fused_gefen
from gefen_jax._microadam import ScaleByMicroAdamState as ScaleByMicroAdamState
from gefen_jax._microadam import microadam as microadam
from gefen_jax._microadam import scale_by_microadam as scale_by_microadam
from gefen_jax._muon import gefen_muon as gefen_muon
from gefen_jax._plan import LeafPlan as LeafPlan
from gefen_jax._plan import Plan as Plan
from gefen_jax._plan_by_shape import plan_by_shape as plan_by_shape
from gefen_jax._release import release as release
from gefen_jax._replan import replan as replan
from gefen_jax._report import MemoryReport as MemoryReport
from gefen_jax._report import memory_report as memory_report
from gefen_jax._scale_by_muon import ScaleByGefenMuonState as ScaleByGefenMuonState
from gefen_jax._scale_by_muon import scale_by_gefen_muon as scale_by_gefen_muon
from gefen_jax._shared_blocks import SharedBlocks as SharedBlocks
from gefen_jax._split_weights import SplitWeightsState as SplitWeightsState
from gefen_jax._split_weights import merge_weights as merge_weights
from gefen_jax._split_weights import split_weights as split_weights
from gefen_jax._state_sharding import state_sharding as state_sharding
from gefen_jax._transform import ScaleByGefenState as ScaleByGefenState
from gefen_jax._transform import scale_by_gefen as scale_by_gefen
from gefen_jax._untrained import Untrained as Untrained
from gefen_jax._wide_dual_code import WideDualCode as WideDualCode
from gefen_jax._with_split_weights import with_split_weights as with_split_weights

__version__ = _version("gefen_jax")
