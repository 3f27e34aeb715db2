"""The plan: what every leaf's state looks like, decided once, before training."""

import dataclasses
import difflib
import fnmatch
import functools
import operator
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gefen_jax import _plan_json
from gefen_jax._blocks import Shape, fits_shards
from gefen_jax._constants import CODES, LEVELS
from gefen_jax._encoder import lookup_is_exact
from gefen_jax._flat_periods import FlatPeriods
from gefen_jax._kinds import KINDS
from gefen_jax._paths import LeafSpec, param_specs
from gefen_jax._specs import Partition, shares
from gefen_jax._types import Kind
from gefen_jax._untrained import Untrained


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf's entry: its path and shape, the kind of its state, and why that kind.

    The ``partition`` says how the leaf lies on the mesh that the plan was made for, if it was made
    for one: its axes and their sizes, and the entries of the leaf's `jax.sharding.PartitionSpec`.
    """

    path: str
    shape: Shape
    kind: Kind
    reason: str
    partition: Partition | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(operator.index(d) for d in self.shape))
        if isinstance(self.kind, type) or not isinstance(self.kind, Kind):
            raise TypeError(
                f"`kind` of `{self.path}` must be a kind of state, e.g. `gefen_jax.Exact()`, got"
                f" {self.kind!r}"
            )
        try:
            self.kind.check(self.shape)
        except ValueError as error:
            raise ValueError(f"plan for `{self.path}`: {error}") from None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of this leaf's state."""
        state = jax.eval_shape(lambda: self.kind.init(self.shape))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    @property
    def size(self) -> int:
        """Elements of the leaf."""
        return int(np.prod(self.shape, dtype=np.int64))


class PlanRow(NamedTuple):
    """A row of `Plan.table`."""

    path: str
    shape: Shape
    kind: str
    block: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the moments of every leaf are kept, and the codebook they start with.

    Immutable, hashable, and equal to another plan exactly when all it holds is equal. Leaves are
    looked up by key path, so one plan serves a whole model and any part of it (`optax.masked`,
    `optax.partition`). Made by `calibrate` or `plan_by_shape`.

    Attributes:
      leaves: One `LeafPlan` per leaf of the parameters.
      codebook: The 256 sorted entries in [-1, 1] of the momentum's codebook, float32 values.
      codebook_reason: Where the codebook comes from.
      rule: The rule that chose the blocks: "axis", "reference" or "shape".

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"kernel": jnp.zeros((768, 3072)), "bias": jnp.zeros(3072)})
      >>> plan
      Plan(rule='shape', 2 leaves, 2,362,368 parameters, 1.0291 bytes per parameter)
      >>> plan["kernel"].kind, plan["kernel"].reason
      (DualCode(block=(1, 256)), 'by shape: 256 along the last axis')
    """

    leaves: tuple[LeafPlan, ...]
    codebook: tuple[float, ...]
    codebook_reason: str
    rule: str

    def __post_init__(self):
        object.__setattr__(self, "leaves", tuple(self.leaves))
        values = np.asarray(self.codebook, np.float32)
        if values.shape != (CODES,) or not np.all(np.isfinite(values)):
            raise ValueError(f"`codebook` must be {CODES} finite numbers, got {values.shape}")
        if np.any(np.diff(values) < 0) or values[0] < -1 or values[-1] > 1:
            raise ValueError("`codebook` must be sorted and lie in [-1, 1]")
        object.__setattr__(self, "codebook", tuple(values.tolist()))
        paths = [leaf.path for leaf in self.leaves]
        if len(set(paths)) < len(paths):
            twice = next(p for p in paths if paths.count(p) > 1)
            raise ValueError(f"`leaves` names `{twice}` twice")

    @functools.cached_property
    def _by_path(self) -> dict[str, LeafPlan]:
        return {leaf.path: leaf for leaf in self.leaves}

    @functools.cached_property
    def exact_lookup(self) -> bool:
        """Whether the encoder's lookup table is exact for this codebook."""
        return lookup_is_exact(np.asarray(self.codebook, np.float32))

    def __getitem__(self, path: str) -> LeafPlan:
        """The entry of a leaf; an unknown path is an error that names the nearest known ones."""
        try:
            return self._by_path[path]
        except KeyError:
            raise KeyError(self._unknown(path)) from None

    def _unknown(self, path: str) -> str:
        near = difflib.get_close_matches(path, self._by_path, n=3)
        hint = f"the nearest are {near}" if near else f"it has {list(self._by_path)[:3]} ..."
        return (
            f"the plan has no leaf `{path}`; {hint}. Make the plan from the same parameter tree"
            " that is given to `init`."
        )

    def kinds(self, specs: Iterable[LeafSpec]) -> dict[str, Kind]:
        """The kinds of the given leaves.

        Raises:
          ValueError: For a leaf that the plan does not know or knows with another shape.
        """
        kinds = {}
        for spec in specs:
            leaf = self._by_path.get(spec.path)
            if leaf is None and not spec.trained:
                kinds[spec.path] = Untrained()
                continue
            if leaf is None:
                raise ValueError(self._unknown(spec.path))
            if spec.trained and leaf.shape != spec.shape:
                raise ValueError(
                    f"the plan expects `{spec.path}` of shape {leaf.shape}, found {spec.shape}."
                    " Make a new plan for this model; inside `shard_map`, make it from the local"
                    " shapes."
                )
            kinds[spec.path] = leaf.kind
        return kinds

    def with_kind(self, pattern: str, kind: Kind) -> "Plan":
        """A plan in which the leaves whose path matches a shell pattern have another kind.

        Leaves without moments (`Untrained`), which are no floats, stay without.

        Args:
          pattern: As in `fnmatch`, e.g. ``"*embedding*"``.
          kind: The kind; it must fit each of these leaves.

        Raises:
          ValueError: If no path of a leaf with moments matches, or the kind does not fit a leaf.
          TypeError: If the kind is none.
        """
        # What is no float never has moments: a pattern for all others may match it, too.
        hit = [
            leaf.path
            for leaf in self.leaves
            if fnmatch.fnmatchcase(leaf.path, pattern) and not isinstance(leaf.kind, Untrained)
        ]
        if not hit:
            raise ValueError(f"`pattern` {pattern!r} matches no leaf of the plan that is trained")
        leaves = tuple(
            dataclasses.replace(leaf, kind=kind, reason="set by hand") if leaf.path in hit else leaf
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=leaves)

    @property
    def bytes_per_param(self) -> float:
        """Bytes of the whole optimizer state (moments, codebooks, count) per parameter."""
        size = sum(leaf.size for leaf in self.leaves if leaf.nbytes)
        total = sum(leaf.nbytes for leaf in self.leaves) + 4 * (CODES + LEVELS) + 4
        return total / size if size else 0.0

    def table(self) -> tuple[PlanRow, ...]:
        """One row per leaf: path, shape, kind, block, bytes of state, reason."""
        return tuple(
            PlanRow(x.path, x.shape, x.kind.name, x.kind.describe(), x.nbytes, x.reason)
            for x in self.leaves
        )

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in self.leaves)
        return (
            f"Plan(rule={self.rule!r}, {len(self.leaves)} leaves, {size:,} parameters,"
            f" {self.bytes_per_param:.4f} bytes per parameter)"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON, one leaf per line; the file appears whole or not at all."""
        leaves = [
            {
                "path": leaf.path,
                "shape": leaf.shape,
                "kind": leaf.kind.name,
                **dataclasses.asdict(leaf.kind),  # pyright: ignore[reportArgumentType] (Protocol)
                "reason": leaf.reason,
                **({} if leaf.partition is None else leaf.partition._asdict()),
            }
            for leaf in self.leaves
        ]
        data = {
            "rule": self.rule,
            "codebook_reason": self.codebook_reason,
            "leaves": leaves,
            # The shortest decimals that read back as the same float32.
            "codebook": [float(str(np.float32(c))) for c in self.codebook],
        }
        _plan_json.write(path, data)

    def check_saved(self, path: str | os.PathLike) -> None:
        """Refuses a checkpoint of another plan: the plan saved beside it must be as this one.

        To be called before the state is restored: some libraries cast what they read to the dtypes
        that are asked for, and a state of one kind may have the shapes of another. Where plans
        differ, restore with the saved one; `replan` takes the state to this one.

        Args:
          path: What `save` wrote beside the checkpoint.

        Raises:
          ValueError: If the file is no readable plan; for the first leaf, by name, that has another
            shape or kind there, or is in one plan only; for another codebook.
        """
        saved, name = type(self).load(path), os.fspath(path)
        advice = "Restore with `Plan.load` of it; `gefen_jax.replan` takes the state to this plan."
        for leaf in (*self.leaves, *saved.leaves):
            ours, theirs = (plan._by_path.get(leaf.path) for plan in (self, saved))
            if ours is None or theirs is None:
                where = "this plan" if theirs is None else "the saved one"
                raise ValueError(
                    f"`{name}` is the plan of another model: `{leaf.path}` is in {where} only"
                )
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"`{name}` is the plan of another model: it has `{leaf.path}` of shape"
                    f" {theirs.shape}, this plan of shape {ours.shape}"
                )
            if ours.kind != theirs.kind:
                raise ValueError(
                    f"`{name}` is another plan: it keeps `{leaf.path}` as {theirs.kind}, this one"
                    f" as {ours.kind}. {advice}"
                )
        if self.codebook != saved.codebook:
            raise ValueError(f"`{name}` is another plan: it has another codebook. {advice}")

    def across_shards(
        self, params: Any, specs: Any = None, *, mesh: Mesh | AbstractMesh | None = None
    ) -> dict[str, str]:
        """The leaves whose blocks would cross shards: a plan made for one mesh, used on another.

        The steps of such leaves are right, but they communicate, and statistics that do not divide
        are replicated. `replan` takes a state to a plan whose blocks fit.

        Args:
          params: The parameters, or their `jax.ShapeDtypeStruct`s.
          specs: Where they lie, as in `state_sharding`; None to ask the parameters.
          mesh: The mesh that the ``specs`` are for; it may be abstract.

        Returns:
          What crosses what, by path; empty if every block fits, as on one device.

        Raises:
          ValueError: For a leaf that the plan does not know or knows with another shape; for specs
            that do not fit the parameters.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from jax.sharding import AbstractMesh, PartitionSpec as P
          >>> import gefen_jax as gx
          >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
          >>> where = {"specs": {"w": P(None, "tensor")}, "mesh": AbstractMesh((8,), ("tensor",))}
          >>> gx.plan_by_shape(params).across_shards(params, **where)
          {'w': 'blocks of 1x256 cross shards of (512, 128)'}
          >>> gx.plan_by_shape(params, **where).across_shards(params, **where)
          {}
        """
        leaves = param_specs(params)
        kinds, held = self.kinds(leaves), shares(params, specs, mesh)
        return {
            path: f"blocks of {kinds[path].describe()} cross shards of {held[path].shape}"
            for path, shape, _ in leaves
            if not _fits(kinds[path], shape, held[path].shape)
        }

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads a plan that `save` wrote.

        Raises:
          ValueError: If the file is no plan, is damaged, or has a version this package cannot
            read.
        """
        try:
            data = _plan_json.read(path)
            leaves = tuple(_read_leaf(leaf) for leaf in data["leaves"])
            return cls(leaves, tuple(data["codebook"]), data["codebook_reason"], data["rule"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"`{os.fspath(path)}` is not a readable plan: {type(error).__name__}: {error}"
            ) from error


def _fits(kind: Kind, shape: Shape, local: Shape) -> bool:
    """Whether no block of a leaf crosses shards of the shape ``local``."""
    if isinstance(kind, FlatPeriods):
        return local == shape  # its runs go over all axes
    return fits_shards(shape, kind.scale_block or (1,) * len(shape), local)


def _read_leaf(data: dict[str, Any]) -> LeafPlan:
    data = dict(data)
    path, shape, reason = data.pop("path"), tuple(data.pop("shape")), data.pop("reason")
    name, mesh, spec = data.pop("kind"), data.pop("mesh", None), data.pop("spec", None)
    if name not in KINDS:
        raise ValueError(f"`{path}` has the unknown kind {name!r}")
    fields = {k: _as_tuple(v) for k, v in data.items()}
    partition = None
    if mesh is not None:
        partition = Partition(tuple(map(_as_tuple, mesh)), tuple(map(_as_tuple, spec)))
    return LeafPlan(path, shape, KINDS[name](**fields), reason, partition)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
