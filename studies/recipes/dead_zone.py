"""How many weights are zero, and how many of them stay so.

Shape suffixes: M outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nomatmul.models.diagnostics import bit_linears
from nomatmul.ops.bitlinear import absmean_ternarize


class DeadZone:
    """Looks at the ternary weights of the blocks, in the second half of a run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.looks = 0
        self.last: list[Tensor] = []
        self.always: list[Tensor] = []  # zero at every look
        self.flipped = 0

    @torch.no_grad()
    def look(self) -> None:
        now = [
            absmean_ternarize(layer.weight)[0].to(torch.int8)
            for name, layer in bit_linears(self.model)
            if name != "head"
        ]
        zero = [t_MK == 0 for t_MK in now]
        if self.looks:
            self.flipped = sum(int((a != b).sum()) for a, b in zip(now, self.last, strict=True))
            zero = [a & b for a, b in zip(zero, self.always, strict=True)]
        self.always, self.last, self.looks = zero, now, self.looks + 1

    def row(self) -> dict[str, float]:
        """Shares of the weights: zero now, zero at every look, changed between the last two."""
        total = sum(t_MK.numel() for t_MK in self.last)
        if not total or self.looks < 2:
            return {}
        counts = {
            "zero": sum(int((t_MK == 0).sum()) for t_MK in self.last),
            "stuck": sum(int(t_MK.sum()) for t_MK in self.always),
            "flipped": self.flipped,
        }
        return {name: round(count / total, 5) for name, count in counts.items()}
