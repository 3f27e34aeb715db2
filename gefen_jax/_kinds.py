"""The one list of the kinds of leaf that there are."""

from gefen_jax._dual_code import DualCode
from gefen_jax._exact import Exact
from gefen_jax._flat_periods import FlatPeriods
from gefen_jax._shared_blocks import SharedBlocks
from gefen_jax._types import Kind
from gefen_jax._untrained import Untrained
from gefen_jax._wide_dual_code import WideDualCode

_ALL: tuple[type[Kind], ...] = (
    Exact,
    DualCode,
    WideDualCode,
    SharedBlocks,
    FlatPeriods,
    Untrained,
)
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in _ALL}
