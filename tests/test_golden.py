"""Parity with the reference: trajectories recorded from the Gefen package (tests/golden).

Every case runs freely from step 1: nothing is reset to the recorded state on the way, so an error
would grow and show.

Tolerances. ``u = 2**-24`` is the relative rounding error of float32, ``U = 2**-8`` that of
bfloat16.

- Codebooks, periods and groups: identical.
- Codes: identical, but for a counted few per case (`Case.flips`): where a normalised momentum lies
  within rounding of the border between two codes, another order of summation may pick the
  neighbour. None moves by more than one code.
- Scales and nu: 16 u. A step rounds about four times (square, mean, product, sum), the roundings
  of old steps fade, and no more than 16 of them ever point the same way.
- Parameters: the step error times the way they went, plus 1.5 ulp of the parameter per step
  (either side rounds its sum, the reference its weight decay, too). The step error is that of the
  bias correction: the reference divides by float64 numbers, ours are ``1 - b**t`` in float32, as
  Optax has them. At t = 1 and b2 = 0.999 that is off by 1.3e-5 of itself, at t = 3 by 2.6e-5, and
  the step, through the root, by half of it; 16 u for everything else. "Of the way" and not "of the
  learning rate", because c7 takes steps of 400 learning rates: there one scale serves elements
  whose nu differ by orders of magnitude.
- bfloat16: see `test_bfloat16_trajectory`.
"""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import gefen_jax as gx
import pallas_kernels
from gefen_jax._codebook import bin_centers, learn_reference
from gefen_jax._period import find_period, period_scores, scale_group

pytestmark = pytest.mark.once

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_U = 2.0**-24
_BF16_U = 2.0**-8
_STATS_RTOL = 16 * _U


class Case(NamedTuple):
    """A trajectory and what is special about it."""

    file: str
    # Codes that may differ, of how many (element, step) pairs there are; a flip is counted at
    # every step at which the two codes differ.
    flips: int = 0
    # Kinds of leaves that the first gradients cannot tell: those without one.
    kinds: Mapping[str, gx.FlatPeriods] = {}
    backend: str | None = None
    # The last step at which a leaf's parameters are those of the reference; the others: all.
    params_until: Mapping[str, int] = {}


# c6. The reference counts the steps of every tensor, we those of the optimizer (as Optax does).
# Until a gradient is absent for the first time the counts agree; while it is absent nothing moves;
# from then on the bias corrections differ and so do the parameters of these two leaves. Their
# codes, scales and nu know nothing of the count and agree to the end.
_FLOAT32 = [
    Case("c1_fp32_mixed_wd0"),
    Case("c2_fp32_mixed_wd"),
    # One of 660480: an element that lies on the border at one step.
    Case("c3_fp32_large_wd", flips=1),
    Case(
        "c6_fp32_edge_none_zero",
        kinds={"late": gx.FlatPeriods(35, 35)},
        params_until={"late": 4, "gap": 6},
    ),
    Case("c7_fp32_all_period1"),
    Case("c8_fp32_all_zero_step1"),
    Case("c9_fp32_groups"),
]
# By the kernel, interpreted: with codes that are looked up, and by halvings, where nu are those of
# elements.
_BY_THE_KERNEL = [
    pytest.param(
        Case(file, backend="triton"),
        marks=[
            pytest.mark.skipif(not pallas_kernels.is_available(), reason="no Triton dialect"),
            pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
        ],
    )
    for file in ("c2_fp32_mixed_wd", "c7_fp32_all_period1")
]
_BFLOAT16 = [Case("c4_bf16_mixed_wd"), Case("c5_bf16_mixed_wd0")]


def _file(case: Case) -> str:
    return case.file if case.backend is None else f"{case.file} by {case.backend}"


class _Data:
    """A golden trajectory, read."""

    def __init__(self, file: str):
        self._arrays = np.load(_GOLDEN / f"{file}.npz")
        self.hyper = json.loads(str(self._arrays["hyper_json"]))
        self.names = list(self.hyper["tensors"])
        self.param_steps = self._arrays["param_steps"].tolist()

    @functools.cache  # noqa: B019 (one object per test; npz files decompress at every access)
    def __call__(self, array: str, name: str = "") -> np.ndarray:
        x = self._arrays[f"{array}__{name}" if name else array]
        return x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x

    def gradients(self, t: int) -> dict[str, Any]:
        """Those of step t, None where there was none."""
        return {
            k: jnp.asarray(self("grad", k)[t - 1]) if self("present", k)[t - 1] else None
            for k in self.names
        }

    def params(self) -> dict[str, Any]:
        return {k: jnp.asarray(self("param0", k)) for k in self.names}

    def plan(self, case: Case) -> gx.Plan:
        plan = gx.calibrate(self.params(), self.gradients(1), rule="reference")
        for name, kind in case.kinds.items():
            plan = plan.with_kind(name, kind)
        return plan

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The hyperparameters of every parameter group."""
        return [self.hyper] + [g for g in [self.hyper["group2"]] if g]

    def step_error(self) -> float:
        """Of a step: half that of the worst bias correction in float32, and 16 u."""
        t = np.arange(1, self.hyper["T"] + 1)
        worst = 0.0
        for group in self.groups:
            for b, power in zip(group["betas"], (1.0, 0.5), strict=True):
                ours = np.asarray(1 - b ** jnp.asarray(t, jnp.int32), np.float64)
                worst = max(worst, power * np.abs(ours / (1 - b**t) - 1).max())
        return worst + 16 * _U

    def optimizer(
        self, plan: gx.Plan, backend: str | None
    ) -> optax.GradientTransformationExtraArgs:
        """One gefen per parameter group, all of them with the one plan and its codebook."""
        second = set().union(*(group.get("names", ()) for group in self.groups))
        parts = {
            str(i): gx.gefen(
                group["lr"],
                *group["betas"],
                group["eps"],
                weight_decay=group["weight_decay"],
                plan=plan,
                backend=backend,
            )
            for i, group in enumerate(self.groups)
        }
        labels = {k: str(int(k in second)) for k in self.names}
        # A mask has no place for a leaf whose gradient is None: no partition where none is needed.
        return optax.partition(parts, labels) if len(parts) > 1 else parts["0"]


class _Moment(NamedTuple):
    """A leaf after a step, as NumPy arrays."""

    mu: np.ndarray
    scale: np.ndarray
    nu: np.ndarray
    param: np.ndarray
    way: np.ndarray  # sum so far of |update| and |weight decay|
    peak: np.ndarray  # largest |param| so far


def _leaf_state(state: Any, name: str) -> list[np.ndarray]:
    """mu, scale and nu of a leaf, in whatever parameter group it is."""
    groups = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, gx.ScaleByGefenState))
    groups = [x for x in groups if isinstance(x, gx.ScaleByGefenState)]
    (mine,) = [s for s in groups if not isinstance(s.mu[name], optax.MaskedNode)]
    return [np.asarray(slot[name]) for slot in (mine.mu, mine.scale, mine.nu)]


def _run(
    data: _Data, plan: gx.Plan, backend: str | None = None
) -> Iterator[tuple[int, dict[str, _Moment]]]:
    """Our own trajectory on the recorded gradients: (t, leaves after step t) for every t."""
    optimizer = data.optimizer(plan, backend)

    decay = max(group["lr"] * group["weight_decay"] for group in data.groups)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        # Leaf by leaf: `optax.apply_updates` takes no None for a parameter that is there.
        moved = {k: optax.apply_updates(params[k], u) for k, u in updates.items() if u is not None}
        return updates, state, params | moved

    params = data.params()
    state = optimizer.init(params)
    peak = {k: np.abs(np.asarray(p, np.float32)) for k, p in params.items()}
    way = {k: np.zeros_like(p) for k, p in peak.items()}
    for t in range(1, data.hyper["T"] + 1):
        updates, state, params = step(data.gradients(t), state, params)
        leaves = {}
        for k, u in updates.items():
            # The two are added: an update is smaller than its parts where they point apart.
            u = np.abs(np.asarray(0 if u is None else u, np.float32)) + decay * peak[k]
            param = np.asarray(params[k])
            way[k] = way[k] + u
            peak[k] = np.maximum(peak[k], np.abs(param.astype(np.float32)))
            leaves[k] = _Moment(*_leaf_state(state, k), param, way[k], peak[k])
        yield t, leaves


def _check_plan(data: _Data, plan: gx.Plan) -> None:
    """Codebook, periods and groups are those of the reference."""
    assert np.array_equal(np.asarray(plan.codebook, np.float32), data("codebook"))
    for k in data.names:
        expected = gx.FlatPeriods(int(data("period", k)), int(data("mag_group", k)))
        assert plan[k].kind == expected
        # From the first gradient that there is, if that was not at the first step.
        first = data("grad", k)[np.argmax(data("present", k))].astype(np.float32).ravel()
        period = find_period(first * first)
        assert (period, scale_group(first.size, period)) == (expected.period, expected.group)


@pytest.mark.parametrize("case", _FLOAT32 + _BY_THE_KERNEL, ids=_file)
def test_float32_trajectory(case: Case):
    data = _Data(case.file)
    plan = data.plan(case)
    _check_plan(data, plan)
    step_error = data.step_error()
    flips = 0
    flipped = {k: np.zeros(data("param0", k).shape, bool) for k in data.names}
    for t, leaves in _run(data, plan, case.backend):
        for k, ours in leaves.items():
            codes = data("m_idx", k)[t - 1].reshape(ours.mu.shape)
            differ = codes != ours.mu
            flips += int(differ.sum())
            flipped[k] |= differ
            assert np.all(np.abs(codes.astype(int) - ours.mu) <= 1)
            np.testing.assert_allclose(ours.scale, data("m_mag", k)[t - 1], rtol=_STATS_RTOL)
            np.testing.assert_allclose(ours.nu, data("vmean", k)[t - 1], rtol=_STATS_RTOL)
            if t not in data.param_steps or t > case.params_until.get(k, t):
                continue
            param = data("param", k)[data.param_steps.index(t)]
            tolerance = step_error * ours.way + 1.5 * t * np.spacing(ours.peak)
            # An element whose code differed goes its own way from there; its neighbours do not:
            # the largest of a block, which sets the scale, has the code of 1 or -1.
            assert np.all((np.abs(ours.param - param) <= tolerance) | flipped[k])
    assert flips <= case.flips


@pytest.mark.parametrize("case", _BFLOAT16, ids=_file)
def test_bfloat16_trajectory(case: Case):
    """What can be equal is, and the rest differs by the reference's bfloat16 roundings.

    The reference keeps momentum scales and nu in the parameter's dtype and computes the momentum
    in it. Ours are float32 at the same number of scales: more exact, not equal. With rounding
    errors of U per operation, and b1, b2 the decay rates:

    - nu: ``v = fl(fl(b2 v) + a)``, so ``D <- X + U (nu + X)`` with ``X = b2 D + U b2 (nu_old + D)``
      bounds the difference; the first is one rounding of ours.
    - momentum c[code] * scale: the difference is that of the old one times b1, plus the errors of
      storing it, half the widest gap between codes times the scale on either side, plus roundings
      of the reference: the old momentum, the gradient's share, their sum, the scale, the quotient
      and the product, 6 U of numbers not above the larger scale of the two steps.
    - parameters: either side rounds up to three times per step (the update, the weight decay, the
      sum), half an ulp of the parameter each at most, together 3 ulp; the directions, numbers of
      about 1, differ by less than 1.
    """
    data = _Data(case.file)
    plan = data.plan(case)
    _check_plan(data, plan)
    codebook = data("codebook")
    b1, b2 = data.hyper["betas"]
    gap = np.diff(codebook).max()
    nu_bound = {k: 0.0 for k in data.names}
    m_bound = {k: 0.0 for k in data.names}
    nu_old = {k: 0.0 for k in data.names}
    scale_old = {k: 0.0 for k in data.names}
    for t, leaves in _run(data, plan):
        for k, ours in leaves.items():
            vmean = data("vmean", k)[t - 1].astype(np.float32)
            carried = b2 * nu_bound[k] + _BF16_U * b2 * (nu_old[k] + nu_bound[k])
            nu_bound[k] = carried + _BF16_U * (ours.nu + carried)
            nu_old[k] = ours.nu
            assert np.all(np.abs(ours.nu - vmean) <= nu_bound[k])

            theirs = data("m_mag", k)[t - 1].astype(np.float32)[:, None]
            scale = ours.scale[:, None]
            largest = np.maximum(np.maximum(scale, theirs), scale_old[k])
            m_bound[k] = b1 * m_bound[k] + (gap + 6 * _BF16_U) * largest
            scale_old[k] = largest
            shape = (len(scale), -1)
            m = codebook[ours.mu].reshape(shape) * scale
            m_theirs = codebook[data("m_idx", k)[t - 1]].reshape(shape) * theirs
            assert np.all(np.abs(m - m_theirs) <= m_bound[k])

            param = data("param", k)[data.param_steps.index(t)]
            difference = ours.param.astype(np.float32) - param.astype(np.float32)
            ulp = 2 * _BF16_U * ours.peak
            assert np.all(np.abs(difference) <= t * (3 * ulp + data.hyper["lr"]))
            if t == 1:
                assert np.array_equal(ours.nu.astype(ml_dtypes.bfloat16).astype(np.float32), vmean)
                np.testing.assert_allclose(scale, theirs, rtol=_BF16_U)
    assert ours.nu.dtype == ours.scale.dtype == np.float32


_PERIODS = np.load(_GOLDEN / "periods.npz")


@pytest.mark.parametrize("i", range(15))
def test_periods(i: int):
    """Candidates and choice are identical; scores to 1e-9.

    A score is a mean of differences of means of float64 logarithms, below 30 in size: with an
    error of 2**-53 each, and at most 2**16 of them summed in whatever order, 30 * 2**-37 = 2e-10
    is never passed.
    """
    g = _PERIODS[f"g_int16__{i}"].astype(np.float32).ravel() * np.float32(2.0**-20)
    periods, scores = period_scores(g * g)
    assert np.array_equal(periods, _PERIODS[f"cand__{i}"])
    np.testing.assert_allclose(scores, _PERIODS[f"score__{i}"], rtol=0, atol=1e-9)
    assert find_period(g * g) == _PERIODS[f"period__{i}"]


_CODEBOOKS = np.load(_GOLDEN / "codebooks.npz")


@pytest.mark.parametrize("name", [row[0] for row in json.loads(str(_CODEBOOKS["meta_json"]))])
def test_codebooks(name: str):
    """The same float32 numbers, duplicates of the padded ones included."""
    assert np.array_equal(bin_centers(), _CODEBOOKS["bin_centers"])
    codebook = learn_reference(_CODEBOOKS[f"hist__{name}"])
    assert np.array_equal(codebook, _CODEBOOKS[f"codebook__{name}"])
