"""Element by element: MLGRU's step, GLU's product and the residual.

All vectors are int64 of any one shape. z: what a linear gave, VB bits, VF fraction bits; h: the
state, SB bits, HF fraction bits. u_shift: what a product of two VF numbers is shifted to the right
by, so it has 2 * VF - u_shift fraction bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.reference.integer.numerics import GATE_FRACTION, Formats, Int, saturate, shift_rounded
from nomatmul.reference.integer.table import sigmoid, silu

_ONE = 1 << GATE_FRACTION
LOWER_BOUND_MAX = _ONE - 1


@dataclass(frozen=True)
class Step:
    """What a step of MLGRU leaves: the state, and u = g * silu(h)."""

    state: Int
    u: Int


def forget_gate(zf: Int, lower_bound: Int | None, formats: Formats) -> Int:
    """sigmoid(zf) with 16 fraction bits, 0..65536; lifted to lb + (1 - lb) * sigmoid where a bound
    lb (0..65535, 16 fraction bits) is given."""
    gate = sigmoid(zf, formats)
    if lower_bound is None:
        return gate
    return lower_bound + shift_rounded((_ONE - lower_bound) * gate, GATE_FRACTION)


def next_state(gate: Int, zi: Int, h: Int, formats: Formats) -> Int:
    """f * h + (1 - f) * silu(zi) with HF fraction bits, saturated to SB."""
    entering = silu(zi, formats) << (formats.state_fraction - formats.vector_fraction)
    return saturate(
        shift_rounded(gate * h + (_ONE - gate) * entering, GATE_FRACTION), formats.state_bits
    )


def gated_state(zg: Int, h: Int, u_shift: int, formats: Formats) -> Int:
    """u = zg * silu(h), h rounded to VF first; VB bits, saturated."""
    extra = formats.state_fraction - formats.vector_fraction
    rounded = saturate(shift_rounded(h, extra), formats.vector_bits)
    return saturate(shift_rounded(zg * silu(rounded, formats), u_shift), formats.vector_bits)


def mlgru(
    zf: Int, zi: Int, zg: Int, h: Int, lower_bound: Int | None, u_shift: int, formats: Formats
) -> Step:
    """One step of the recurrence."""
    state = next_state(forget_gate(zf, lower_bound, formats), zi, h, formats)
    return Step(state, gated_state(zg, state, u_shift, formats))


def glu(gate: Int, up: Int, u_shift: int, formats: Formats) -> Int:
    """u = silu(gate) * up; VB bits, saturated."""
    return saturate(shift_rounded(silu(gate, formats) * up, u_shift), formats.vector_bits)


def residual(x: Int, y: Int, formats: Formats) -> Int:
    """x + y of one fraction; VB bits, saturated."""
    return saturate(x + y, formats.vector_bits)
