"""Float steps: the same bits on every instruction set, and right against float64.

Legend: D elements of one token. Bounds are multiples of 2^-24, the rounding unit of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from parity_backends import ISAS, Kernels, kernels_of

UNIT = 2.0**-24
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 640, 2560)
EPS = 1e-6
ACTIVATIONS = ("gelu", "silu", "relu", "relu2")
ROUNDINGS = ("away", "even", "up")

F32 = NDArray[np.float32]
Steps = dict[str, NDArray[Any]]


def floats(d: int, count: int, spread: float = 3.0) -> list[F32]:
    """Return `count` float32 vectors of length d."""
    rng = np.random.default_rng([d, count])
    return [(spread * rng.standard_normal(d)).astype(np.float32) for _ in range(count)]


def all_steps(kernels: Kernels, isa: str, vectors: list[F32]) -> Steps:
    """Run each float step once; what must agree between instruction sets."""
    a_D, b_D, c_D, w_D = vectors
    lower_D = (0.45 + 0.45 * np.tanh(w_D)).astype(np.float32)
    out: Steps = {}
    step, q_D = kernels.rms_norm_quantize(isa, a_D, w_D, EPS)
    out["quantize step"], out["q"] = np.array([step], np.float32), q_D
    out["normalise"] = np.empty_like(a_D)
    kernels.normalise(isa, a_D, EPS, out["normalise"])
    step, out["q of two steps"] = kernels.scale_quantize(isa, out["normalise"], w_D)
    out["step of two steps"] = np.array([step], np.float32)
    out["rms_norm"] = np.empty_like(a_D)
    kernels.rms_norm(isa, a_D, w_D, EPS, out["rms_norm"])
    for name, bound, keep in (("plain", None, 1.0), ("bound", lower_D, 1.0), ("pad", lower_D, 0.0)):
        out[f"mlgru {name}"] = c_D.copy()
        kernels.mlgru_step(isa, a_D, b_D, bound, keep, out[f"mlgru {name}"])
    out["gate_norm"] = np.empty_like(a_D)
    kernels.gate_norm(isa, a_D, b_D, w_D, EPS, out["gate_norm"])
    for kind in ACTIVATIONS:
        out[f"gated {kind}"] = np.empty_like(a_D)
        kernels.gated(isa, kind, a_D, b_D, out[f"gated {kind}"])
    for rounding in ROUNDINGS:
        step, out[f"q {rounding}"] = kernels.scale_quantize(isa, a_D, None, rounding)
        out[f"step {rounding}"] = np.array([step], np.float32)
    out["add"] = a_D.copy()
    kernels.add(isa, out["add"], b_D)
    return out


def assert_same_bits(ours: Steps, theirs: Steps) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    for name, expected in theirs.items():
        got = ours[name]
        if expected.dtype == np.float32:
            nan = np.isnan(expected)
            np.testing.assert_array_equal(np.isnan(got), nan, err_msg=name)
            got, expected = got[~nan].view(np.int32), expected[~nan].view(np.int32)
        np.testing.assert_array_equal(got, expected, err_msg=name)


@pytest.mark.parametrize("d", LENGTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_as_scalar(isa: str, d: int) -> None:
    kernels = kernels_of(isa)
    for spread in (1e-20, 1e-3, 3.0, 40.0, 1e4):
        vectors = floats(d, 4, spread)
        assert_same_bits(
            all_steps(kernels, isa, vectors), all_steps(kernels_of("scalar"), "scalar", vectors)
        )


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_strange_values(isa: str) -> None:
    """NaN, infinities, denormals, zeros of both signs, the edges of exp's range."""
    strange = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan]
    edges = [87.9, 88.0, 88.1, -87.9, -88.0, -88.1, 1e5, -1e5, 103.0, -103.0]
    values = np.array(strange + edges, dtype=np.float32)
    kernels = kernels_of(isa)
    with np.errstate(all="ignore"):
        for shift in range(4):
            vectors = [np.roll(np.resize(values, 37), 3 * shift + i) for i in range(3)]
            vectors.append(np.ones(37, np.float32))
            ours = all_steps(kernels, isa, vectors)
            theirs = all_steps(kernels_of("scalar"), "scalar", vectors)
            for undefined in (
                "q",
                "q of two steps",
                *(f"q {name}" for name in ROUNDINGS),
            ):  # where x is not finite
                del ours[undefined], theirs[undefined]
            assert_same_bits(ours, theirs)


def rms64(x_D: F32, eps: float) -> NDArray[np.float64]:
    """Return x / sqrt(mean(x^2) + eps) in float64."""
    x64 = x_D.astype(np.float64)
    return x64 / np.sqrt((x64 * x64).mean() + np.float64(np.float32(eps)))


def sigmoid64(x_D: F32) -> NDArray[np.float64]:
    """Return 1 / (1 + exp(-x)) in float64."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x_D.astype(np.float64)))


def norm_bound(d: int) -> float:
    """Relative error of x * inverse_rms * w.

    Each square is rounded once and passes ceil(d / 16) + 4 additions of positive terms; the root
    halves that. Division, sum, root, reciprocal and two products add one unit each.
    """
    return ((-(-d // 16) + 5) / 2 + 6) * UNIT


# Relative error of sigmoid: exp is good to 2e-7 (about 3.5 units), then a sum and a division.
SIGMOID_BOUND = 6 * UNIT


@pytest.mark.parametrize("d", LENGTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_norms_are_right(isa: str, d: int) -> None:
    kernels = kernels_of(isa)
    x_D, h_D, w_D = floats(d, 3)
    expected = rms64(x_D, EPS) * w_D
    y_D = np.empty_like(x_D)
    kernels.rms_norm(isa, x_D, w_D, EPS, y_D)
    assert (np.abs(y_D - expected) <= norm_bound(d) * np.abs(expected)).all()
    gated = expected * h_D * sigmoid64(h_D)
    kernels.gate_norm(isa, x_D, h_D, w_D, EPS, y_D)
    bound = norm_bound(d) + SIGMOID_BOUND + 2 * UNIT
    assert (np.abs(y_D - gated) <= bound * np.abs(gated)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_gates_are_right(isa: str) -> None:
    kernels = kernels_of(isa)
    x_D = np.concatenate([np.linspace(-87, 100, 4001), np.linspace(-2, 2, 999)]).astype(np.float32)
    up_D = floats(len(x_D), 1)[0]
    y_D = np.empty_like(x_D)
    kernels.gated(isa, "silu", x_D, up_D, y_D)
    expected = x_D * sigmoid64(x_D) * up_D
    assert (np.abs(y_D - expected) <= (SIGMOID_BOUND + 2 * UNIT) * np.abs(expected)).all()
    f_D, h_D = floats(len(x_D), 2, 5.0)
    lower_D = np.random.default_rng(1).uniform(0, 0.99, len(x_D)).astype(np.float32)
    got = h_D.copy()
    kernels.mlgru_step(isa, x_D, f_D, lower_D, 1.0, got)
    forget = lower_D + (1.0 - lower_D.astype(np.float64)) * sigmoid64(f_D)
    silu = x_D * sigmoid64(x_D)
    expected = forget * h_D + silu * (1.0 - forget)
    # 1 - forget cancels, so its error is absolute; it and both terms are at most 1 * (|h| + |silu|)
    bound = (SIGMOID_BOUND + 8 * UNIT) * (np.abs(h_D) + np.abs(silu))
    assert (np.abs(got - expected) <= 2 * bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_gates_far_out(isa: str) -> None:
    kernels = kernels_of(isa)
    x_D = np.array([-1e30, -1e4, -200, -89, 89, 200, 1e4, 1e30], np.float32)
    y_D = np.empty_like(x_D)
    kernels.gated(isa, "silu", x_D, np.ones_like(x_D), y_D)
    np.testing.assert_array_equal(y_D, np.maximum(x_D, 0))


def round_half_away(v: NDArray[np.float32]) -> NDArray[np.int32]:
    """docs/numerics.md, word for word."""
    whole = np.trunc(v)
    away = (np.abs(v - whole) >= np.float32(0.5)) * np.sign(v)
    return np.clip(whole + away, -128, 127).astype(np.int32)


def quantized_as_is(kernels: Kernels, isa: str, y_D: F32) -> tuple[float, NDArray[np.int8]]:
    """Quantise y itself: eps = 2^80 swallows mean(y^2), so the norm is exactly 2^-40."""
    return kernels.rms_norm_quantize(isa, y_D, np.full_like(y_D, 2.0**40), float(2.0**80))


@pytest.mark.parametrize("isa", ISAS)
def test_ties_round_away_from_zero(isa: str) -> None:
    """With the largest value 127 the scale is exactly 1, so q = round(y)."""
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    y_D = np.array(
        [127, 0.5, -0.5, below, -below, 1.5, -1.5, 2.5, -2.5, 126.5, -126.5, -127, 0.0, 1.25, 63.5],
        np.float32,
    )
    assert np.float32(0.49999997) == np.float32(below)
    step, q_D = quantized_as_is(kernels_of(isa), isa, y_D)
    assert step == 1.0
    expected = [127, 1, -1, 0, 0, 2, -2, 3, -3, 127, -127, -127, 0, 1, 64]
    np.testing.assert_array_equal(q_D, expected)


@pytest.mark.parametrize("d", LENGTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_quantiser_follows_its_definition(isa: str, d: int) -> None:
    kernels = kernels_of(isa)
    x_D, w_D = floats(d, 2)
    y_D = np.empty_like(x_D)
    kernels.rms_norm(isa, x_D, w_D, EPS, y_D)
    absmax = max(np.abs(y_D).max(), np.float32(1e-5))
    step, q_D = kernels.rms_norm_quantize(isa, x_D, w_D, EPS)
    assert np.float32(step) == absmax / np.float32(127)
    np.testing.assert_array_equal(q_D, round_half_away(y_D * (np.float32(127) / absmax)))


@pytest.mark.parametrize("d", LENGTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_two_steps_are_one(isa: str, d: int) -> None:
    x_D, w_D = floats(d, 2)
    steps = all_steps(kernels_of(isa), isa, [x_D, x_D, x_D, w_D])
    np.testing.assert_array_equal(steps["q"], steps["q of two steps"])
    assert steps["quantize step"] == steps["step of two steps"]


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_but_zeros(isa: str) -> None:
    step, q_D = kernels_of(isa).rms_norm_quantize(
        isa, np.zeros(20, np.float32), np.ones(20, np.float32), EPS
    )
    assert np.float32(step) == np.float32(1e-5) / np.float32(127)
    assert not q_D.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_is_reported(isa: str, bad: float) -> None:
    kernels = kernels_of(isa)

    def call(x_D: F32, w_D: F32) -> float:
        return kernels.rms_norm_quantize(isa, x_D, w_D, EPS)[0]

    for d in (1, 16, 21, 640):
        for at in {0, d // 2, d - 1}:
            x_D, w_D = floats(d, 2)
            x_D[at] = bad
            assert np.isnan(call(x_D, w_D)), f"x[{at}] of {d}"
            x_D, w_D = floats(d, 2)
            w_D[at] = bad
            assert np.isnan(call(x_D, w_D)), f"w[{at}] of {d}"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_ties_are_rounded_as_named(isa: str, rounding: str) -> None:
    """With a largest value of 127 the scale is 1, so halves are ties."""
    y_D = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.49999997, 0.25], np.float32)
    y_D = np.concatenate([y_D, np.arange(-126.5, 127, 1, dtype=np.float32)])
    rules = {
        "away": lambda v: np.trunc(v) + np.sign(v) * (np.abs(v - np.trunc(v)) >= 0.5),
        "even": np.rint,
        "up": lambda v: np.floor(v + np.float32(0.5)),
    }
    step, q_D = kernels_of(isa).scale_quantize(isa, y_D, None, rounding)
    assert step == 1.0
    np.testing.assert_array_equal(q_D, rules[rounding](y_D).astype(np.int8))


@pytest.mark.parametrize("isa", ISAS)
def test_square_of_what_is_positive(isa: str) -> None:
    x_D, up_D = floats(300, 2)
    y_D = np.empty_like(x_D)
    kernels_of(isa).gated(isa, "relu2", x_D, up_D, y_D)
    r_D = np.maximum(x_D, np.float32(0))
    np.testing.assert_array_equal(y_D, r_D * r_D * up_D)
