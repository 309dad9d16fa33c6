"""Muon (Jordan 2024; scaled as in arXiv 2502.16982) for many small matrices.

torch.optim.Muon walks them one by one, some 900 launches a step for a model of five layers: more
than its forward and backward pass. Here all matrices of one shape are one batched product.

Shape suffixes: G matrices, M outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; its elements have the size of AdamW's updates."""

    def __init__(
        self, matrices: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": group} for group in shapes.values()]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update with Nesterov momentum; weights decay by lr * weight_decay."""
        for group in self.param_groups:
            weights, momentum = group["params"], group["momentum"]
            grad_GMK = torch.stack([weight.grad for weight in weights])
            state = self.state[weights[0]]
            if "buffer" not in state:
                state["buffer"] = torch.zeros_like(grad_GMK)
            buffer = state["buffer"]
            buffer.lerp_(grad_GMK, 1 - momentum)
            update = orthogonal(grad_GMK.lerp(buffer, momentum)).to(buffer.dtype)
            scale = group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(update.unbind()), alpha=-scale)


def orthogonal(grad_GMK: Tensor) -> Tensor:
    """Each matrix with its singular values near one (Newton-Schulz in bfloat16)."""
    x = grad_GMK.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_TINY)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
