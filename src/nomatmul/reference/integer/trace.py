"""What integer inference leaves behind after every step: the names, and their order.

A trace is a list of (name, int64 array) in the order of execution, which is the order of
instructions. Scalars are [2], (m, e). A fold F (docs/hardware-numerics.md) leaves, for its linears
behind one quantised input B:

    F.root.scan  F.root.square            SCAN, SUMSQ with the weight w1
    F.gate.scan  F.gate.square            SCAN, SUMSQ of g with ones     (o_proj only)
    F.root.mean                           SMUL by the constant `mean`
    F.gate.mean  F.root.sum               SMUL by `gate`, SADD           (o_proj only)
    F.root.eps                            SADD of `eps`                  (o_proj, down_proj, w_out)
    F.root       F.root.inverse           SSQRT, SDIV(1, root)
    then for each branch B
    B.scan  B.inverse  B.quantised        SCAN with w12, SDIV(127, a), QUANT int8 [K]
    and for each linear L of it
    L.scaled  L.factor                    SMUL(a, constant), SMUL(., root.inverse)

A model leaves

    embed                                 EMBED, the residual [D]
    for each layer N, M = layers.N.mixer
      fold M of branches M.f_proj, M.i_proj, M.g_proj
      M.f_proj.sums  M.i_proj.sums  M.g_proj.sums      PRODUCT (mlgru): accumulators (no memory
      M.h  M.g  M.u                                    keeps them), state, g, u = g * silu(h)
      fold M.o_proj;  M.o_proj.sums  M.residual        PRODUCT (add)
      with a GLU, C = layers.N.channel
        fold C of the branch C.gate_proj, which has the linears C.gate_proj and C.up_proj
        C.gate_proj.sums  C.up_proj.sums  C.u          PRODUCT (glu)
        fold C.down_proj;  C.down_proj.sums  C.residual      PRODUCT (add)
      with trees
        fold C of the branch C.w_in
        C.w_in.rows  C.w_in.sums  C.h  C.norm_out      WALK: A visited rows, their accumulators,
                                                       silu, and weights of norm_out
        fold C.w_out, whose vector is C.h and whose w12 is C.norm_out
        C.w_out.sums  C.residual                       COMBINE
    fold head;  head.sums  logits  argmax              PRODUCT (logits)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from nomatmul.reference.integer.numerics import Int
from nomatmul.reference.integer.scalar import Scalar


@dataclass
class Trace:
    """Everything that one token's steps left, in their order."""

    entries: list[tuple[str, Int]] = field(default_factory=list)

    def record(self, name: str, value: Scalar | ArrayLike) -> None:
        """Add a vector (leading axes of size 1 are dropped) or a scalar."""
        array = value.array() if isinstance(value, Scalar) else np.array(value, np.int64)
        self.entries.append((name, array.reshape(-1)))

    def __iter__(self) -> Iterator[tuple[str, Int]]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Int:
        """The array of this name; KeyError where nothing left it."""
        for found, array in self.entries:
            if found == name:
                return array
        raise KeyError(name)

    @property
    def names(self) -> list[str]:
        """In the order of execution."""
        return [name for name, _ in self.entries]
