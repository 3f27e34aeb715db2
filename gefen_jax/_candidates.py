"""Which blocks a leaf may get, and which one it gets when nothing but its shape is known.

On a mesh a device holds a shard of a leaf, of a shape that is called ``local`` here. A block fits
if its shape divides ``local``: then no block crosses shards, and statistics with one entry per
block can be cut as the leaf is.
"""

import functools
import math
from collections.abc import Mapping

from gefen_jax._blocks import Cut, Shape, block_size, make_block, read_cut
from gefen_jax._constants import (
    DUAL_BLOCK,
    DUAL_MAX,
    DUAL_MIN,
    MAX_BLOCK,
    MIN_BLOCK,
    NARROW_BLOCK,
    OUTPUT_LAYER,
    SMALL_LEAF,
    TARGET_BLOCK,
    VECTOR_SHARE,
)
from gefen_jax._dual_code import DualCode
from gefen_jax._exact import Exact
from gefen_jax._pairs import paired_axis
from gefen_jax._paths import LeafSpec
from gefen_jax._shared_blocks import SharedBlocks
from gefen_jax._types import Kind
from gefen_jax._untrained import Untrained
from gefen_jax._wide_dual_code import WideDualCode

# What people call the layer with one column per token or class.
_OUTPUT_NAMES = frozenset(
    "head lm_head output_head logits logits_dense to_logits unembed unembedding".split()
)

# The least elements of a block that is a narrow shard as it is: it costs half a byte per parameter.
_NARROW = 16


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _spans(shape: Shape, local: Shape) -> list[tuple[int, int, int]]:
    """(axis, end, elements per index of the cut axis) of every cut that a shard admits."""
    return [
        (axis, end, math.prod(shape[axis + 1 : end + 1]))
        for axis in range(len(shape))
        for end in range(axis, len(shape))
        if shape[axis + 1 : end + 1] == local[axis + 1 : end + 1]
    ]


def least_block(shape: Shape, local: Shape) -> int:
    """The fewest elements of a leaf's block: MIN_BLOCK, or a shorter row or column's."""
    short = (
        n
        for n, held in zip(shape[-2:], local[-2:], strict=True)
        if n == held and NARROW_BLOCK <= n < MIN_BLOCK
    )
    return min(short, default=MIN_BLOCK)


def candidate_blocks(shape: Shape, local: Shape | None = None) -> list[Shape]:
    """Boxes of up to MAX_BLOCK elements whose runs divide their axis, and fit the shards.

    Of every cut, the runs nearest to the least block and each doubling of it: a highly composite
    axis has dozens of divisors, which say no more. A leaf that has none (a long vector of prime
    length) gets runs of about TARGET_BLOCK elements with a shorter last one. A narrow shard may be
    a run as it is; below _NARROW elements there is none.
    """
    local = shape if local is None else local
    least, blocks = least_block(shape, local), set()
    for axis, end, whole in _spans(shape, local):
        sizes = [d * whole for d in _divisors(local[axis]) if least <= d * whole <= MAX_BLOCK]
        goal = least
        while sizes and goal <= MAX_BLOCK:
            size = min(sizes, key=lambda n: abs(math.log2(n / goal)))  # noqa: B023 (used at once)
            blocks.add(make_block(shape, Cut(axis, end, size // whole)))
            goal *= 2
    if not blocks:
        blocks = {
            make_block(shape, Cut(axis, end, local[axis]))
            for axis, end, whole in _spans(shape, local)
            if local[axis] < shape[axis] and _NARROW <= local[axis] * whole < MIN_BLOCK
        }
    if not blocks:
        blocks = {
            make_block(shape, Cut(axis, end, min(shape[axis], -(-TARGET_BLOCK // whole))))
            for axis, end, whole in _spans(shape, local)
            if whole < MIN_BLOCK <= shape[axis] * whole and local[axis] == shape[axis]
        }
    return sorted(blocks)


def distance_to_target(block: Shape, target: int = TARGET_BLOCK) -> float:
    """How far a block is from the size that is cheap and still has short scale groups."""
    return abs(math.log2(block_size(block) / target))


def block_by_shape(shape: Shape, local: Shape | None = None, *, is_output: bool = False) -> Shape:
    """The block of a leaf about which nothing is known; it must have candidates.

    Runs of one axis before boxes over several (rows may differ in size), short ones only in a
    matrix, the last axis first (it is contiguous, and the features of an embedding), but the first
    of an output layer; then the size nearest to the target.
    """

    def preference(block: Shape) -> tuple[bool, bool, bool, int, float]:
        axis, end, _ = read_cut(shape, block)
        is_short = len(shape) > 2 and block_size(block) < MIN_BLOCK
        mixes_tokens = is_output and end > 0
        return axis < end, is_short, mixes_tokens, -end, distance_to_target(block)

    return min(candidate_blocks(shape, local), key=preference)


def describe_block(shape: Shape, block: Shape, local: Shape | None = None) -> str:
    """A block in words, e.g. "256 along axis 1", "9 x 64 along axes 0 to 2"."""
    axis, end, _ = read_cut(shape, block)
    sizes = " x ".join(str(b) for b in block[axis : end + 1])
    if axis == end:
        where = "the last axis" if end == len(shape) - 1 else f"axis {axis}"
    else:
        where = f"axes {axis} to {end}"
    shards = "" if local in (None, shape) else f", in shards of {local}"
    return f"{sizes} along {where}{shards}"


def decided_by_size(specs: list[LeafSpec]) -> dict[str, tuple[Kind, str]]:
    """The leaves whose kind their type and size alone decide, with the reason."""
    trained = [s for s in specs if s.trained]
    total = sum(s.size for s in trained)
    vectors = sum(s.size for s in trained if len(s.shape) <= 1)
    decided: dict[str, tuple[Kind, str]] = {}
    for spec in specs:
        if not spec.trained:
            decided[spec.path] = Untrained(), "not a float: no state"
        elif spec.size <= SMALL_LEAF:
            decided[spec.path] = Exact(), f"small: at most {SMALL_LEAF} elements"
        elif len(spec.shape) <= 1 and vectors < VECTOR_SHARE * total:
            decided[spec.path] = Exact(), f"vectors are {vectors / total:.2%} of the model"
    return decided


def exact_if_none_fits(shape: Shape, local: Shape) -> tuple[Kind, str] | None:
    """Exact moments for a leaf whose shards are too narrow for blocks; None if some block fits.

    They lie as the leaf does and need no communication, and a leaf in such shards is small.
    """
    if candidate_blocks(shape, local):
        return None
    return Exact(), f"no block fits shards of {local}"


def is_output_layer(spec: LeafSpec) -> bool:
    """Whether a matrix has one column per token or class, as far as shape and name tell."""
    if len(spec.shape) != 2:
        return False
    rows, columns = spec.shape
    named = not _OUTPUT_NAMES.isdisjoint(spec.path.lower().split("/"))
    return columns > OUTPUT_LAYER * rows or (named and columns > rows)


def dual_block(
    spec: LeafSpec,
    pair_axis: int | None = None,
    local: Shape | None = None,
    make: type[DualCode] = DualCode,
) -> Shape | None:
    """The block of a dual code: a run of the last axis, of about DUAL_BLOCK elements.

    Pairs of the last axis cost least: there are the features of a layer's output, and of one row
    of an embedding. A shorter last axis is taken whole, with a run of the axis before it, and so
    on, but of the first axis only if nothing else is left: the rows of an embedding have seen very
    different numbers of gradients. For that reason an output layer has runs of its first axis.
    Runs of the ``pair_axis`` are preferred to all of these. A narrow shard may be a run as it is.
    None if no such block divides the leaf's shards in pairs.
    """
    shape, last = spec.shape, len(spec.shape) - 1
    local = shape if local is None else local
    spans = {(axis, end): whole for axis, end, whole in _spans(shape, local)}
    axis = last
    while axis > 1 and local[axis] == shape[axis] and math.prod(local[axis:]) < DUAL_BLOCK:
        axis -= 1
    cuts = [(i, last) for i in range(axis, -1, -1)] + [(i, i) for i in range(last - 1, -1, -1)]
    if pair_axis is None and is_output_layer(spec):
        pair_axis = 0
    if pair_axis not in (None, last):
        cuts.insert(0, (pair_axis, pair_axis))
    for axis, end in cuts:
        if (axis, end) not in spans:
            continue
        whole = spans[axis, end]
        least = DUAL_MIN
        if local[axis] < shape[axis]:
            least = min(DUAL_MIN, max(_NARROW, local[axis] * whole))
        blocks = [
            block
            for run in _divisors(local[axis])
            if least <= run * whole <= DUAL_MAX
            and make.has_pairs(block := make_block(shape, Cut(axis, end, run)))
        ]
        if blocks:
            return min(blocks, key=lambda block: distance_to_target(block, DUAL_BLOCK))
    return None


def dual_code(
    spec: LeafSpec,
    pair_axis: int | None = None,
    local: Shape | None = None,
    make: type[DualCode] = DualCode,
) -> tuple[Kind, str]:
    """The dual code of a leaf, from shape and name; shared blocks where it has no pairs."""
    block = dual_block(spec, pair_axis, local, make)
    if block is None:
        kind, reason = shared_blocks(spec, local=local)
        return kind, f"no even runs for a dual code, {reason}"
    why = "by shape"
    if paired_axis(block) == pair_axis:
        why = "as asked"
    elif paired_axis(block) == 0 and is_output_layer(spec):
        why = "an output layer"
    return make(block), f"{why}: {describe_block(spec.shape, block, local)}"


def shared_blocks(
    spec: LeafSpec, pair_axis: int | None = None, local: Shape | None = None
) -> tuple[Kind, str]:
    """The shared blocks of a leaf about whose gradient nothing is known; it has no pairs."""
    del pair_axis
    exact = exact_if_none_fits(spec.shape, spec.shape if local is None else local)
    if exact is not None:
        return exact
    block = block_by_shape(spec.shape, local, is_output=is_output_layer(spec))
    return SharedBlocks(block), f"by shape: {describe_block(spec.shape, block, local)}"


KINDS_BY_SHAPE = {
    DualCode.name: dual_code,
    WideDualCode.name: functools.partial(dual_code, make=WideDualCode),
    SharedBlocks.name: shared_blocks,
}


def kinds_by_shape(
    specs: list[LeafSpec],
    kind: str = DualCode.name,
    pair_axes: Mapping[str, int] | None = None,
    shards: Mapping[str, Shape] | None = None,
) -> dict[str, tuple[Kind, str]]:
    """A kind and its reason for every leaf; by path, axes of pairs and shapes of shards."""
    decided = decided_by_size(specs)
    for spec in specs:
        if spec.path not in decided:
            axis = (pair_axes or {}).get(spec.path)
            local = (shards or {}).get(spec.path)
            decided[spec.path] = KINDS_BY_SHAPE[kind](spec, axis, local)
    return decided
