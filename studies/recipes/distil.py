"""A teacher's distribution among the targets, its logits made on the fly.

The gradient of the student's logits is p - (1 - w) [target] - w p_teacher. It is put together from
two calls of the package's cross-entropy, of the student's and of the teacher's logits, whose
gradients are p - [target] and p_teacher - [target]: the first less w times the second.

Shape suffixes: B sequences, T steps, N tokens, D hidden, E hidden of the teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomatmul.models import CausalLM
from nomatmul.models.layers import BitLinear
from nomatmul.ops import choose
from nomatmul.ops.fused.parts import step
from nomatmul.ops.loss import IGNORE_INDEX, linear
from nomatmul.ops.loss import naive as rows
from nomatmul.train.parallelize import compile_parts
from nomatmul.train.plan import DevicePlan

CHUNK = 16_384  # tokens whose logits live at once


class Teacher:
    """A trained model that looks at each batch before the student does.

    A ternary-shaped one is one that was trained in full precision (`Change.dense` 1).
    """

    def __init__(self, directory: Path, plan: DevicePlan) -> None:
        self.model: Any = CausalLM.from_pretrained(directory).to(plan.device).train()
        self.model.requires_grad_(False)
        self.model.set_full_precision(True)  # of one that is shaped so
        self.plan = plan
        self.dtype = torch.bfloat16 if plan.bfloat16 else torch.float32
        self.ternary = isinstance(self.model.head, BitLinear)
        self.weight_VE = self.model.head.weight.to(self.dtype)
        self.operands_NE: Tensor | None = None  # at one address: graphs read it
        if plan.memory == "device" and not self.ternary:
            torch._dynamo.config.recompile_limit = 64  # blocks are alike, but for their numbers
            compile_parts(self.model, "default")

    @torch.no_grad()
    def look(self, x_BT: Tensor) -> None:
        """Keep what the head multiplies with `weight_VE`."""
        with self.plan.autocast():
            y_NE = self.model.hidden(x_BT).flatten(0, 1)
            if self.ternary:
                norm = self.model.head.norm
                y_NE = step(
                    "norm_quantize", y_NE, None, norm.weight[None], 0.0, norm.eps, self.dtype
                )[0][0]
        if self.operands_NE is None:
            self.operands_NE = torch.empty_like(y_NE, dtype=self.dtype)
        self.operands_NE.copy_(y_NE)


def distilled_loss(
    model: Any, teacher: Teacher, weight: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """As `build_loss`: the student's own cross-entropy, and gradients of the mixed targets."""

    def loss(x_BT: Tensor, y_BT: Tensor) -> tuple[Tensor, Tensor]:
        with teacher.plan.autocast():
            hidden_ND = model.hidden(x_BT).flatten(0, 1)
            head = model.head
            value = _MixedTargets.apply(
                hidden_ND, head.weight, head.norm.weight, y_BT.flatten(), teacher, weight, head
            )
        return value, torch.zeros_like(value)

    return loss


class _MixedTargets(torch.autograd.Function):
    """Mean cross-entropy of a ternary head; gradients are made while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        norm_D: Tensor,
        target_N: Tensor,
        teacher: Teacher,
        share: float,
        layer: BitLinear,
    ) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            head = linear._TernaryHead(weight_VD, norm_D, layer.norm.eps, layer.slot, teacher.dtype)
            head.prepare_backward()
            dx_ND, dweight_VD = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
            losses, operands_NE = [], teacher.operands_NE
            assert operands_NE is not None, "the teacher reads a batch before its student"
            for start in range(0, x_ND.shape[0], CHUNK):
                part = slice(start, start + CHUNK)
                loss_N, d_NV = _cross_entropy(head.logits(x_ND[part]), target_N[part])
                taught_NV = operands_NE[part] @ teacher.weight_VE.t()
                _, taught_NV = _cross_entropy(taught_NV, target_N[part])
                d_NV.sub_(taught_NV, alpha=share)
                losses.append(loss_N.sum())
                dx_ND[part] = head.backward(x_ND[part], d_NV, dweight_VD)
        ctx.save_for_backward(dx_ND, dweight_VD, head.dnorm.to(norm_D.dtype))
        ctx.count = target_N.shape[0]
        return torch.stack(losses).sum() / ctx.count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dnorm = ctx.saved_tensors
        scale = dloss / ctx.count
        return dx * scale.to(dx.dtype), dweight * scale, dnorm * scale, None, None, None, None


def _cross_entropy(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the gradient of their sum (on a GPU written over the logits)."""
    one = torch.ones((), device=logits_NV.device)
    loss_N, _, d_NV = choose.run(
        "cross_entropy_rows", linear._FAST, rows, logits_NV, target_N, IGNORE_INDEX, one,
        torch.zeros_like(one), True,
    )  # fmt: skip
    return loss_N, d_NV
