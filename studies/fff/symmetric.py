"""Trees whose neurons treat both signs alike, and ternary layers in a dense model.

arXiv 2604.08565 finds that trees prune themselves: a neuron with gelu passes gradients of one sign
of its logit only, so one side of its decision learns less and is visited less. As far as public
text tells, its cure is architecture, without a loss for balance: neurons add their logits as they
are, and the nonlinearity comes behind the sum ("after"). Beside it two activations that are
symmetric themselves: "tanh" and "abs".

Computed in the masked form alone. Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels,
V nodes of all trees. A library of trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.models import FFF
from nomatmul.models.channels.fff import result_type
from nomatmul.models.channels.ffn import FFN
from nomatmul.ops.bitlinear.steps import wide
from nomatmul.ops.fff import masked
from studies.fff.layers import replace_trees

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "after": lambda logits: logits,
    "tanh": torch.tanh,
    "abs": torch.abs,
}
EXCHANGES = (*FORMS, "ternary")


class SymmetricFFF(FFF):
    """An FFF with one of FORMS in place of its activation; "after" has gelu at its end."""

    def __init__(self, *args: Any, form: str, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.linear == "dense", "not tried"
        self.form = form

    @classmethod
    def like(cls, layer: FFF, form: str) -> SymmetricFFF:
        """A layer of the sizes of `layer`."""
        assert layer.master is None, "not tried"
        sizes = {"trees": layer.trees, "depth": layer.depth, "bias": layer.bias is not None}
        return cls(layer.hidden, layer.out, form=form, linear=layer.linear, **sizes)

    def walk_and_sum(self, x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = result_type(x_NK)
        with torch.autocast(x_NK.device.type, enabled=False):
            x_NK, w_in, w_out = (t.to(kind) for t in (x_NK, self.w_in, self.w_out))
            logits_NV = masked.all_logits(x_NK, w_in, self.bias)
            nodes_NTL = masked.visited(logits_NV, self.trees, self.depth)
            rows_NA = nodes_NTL.flatten(1)
            mask_NV = torch.zeros_like(logits_NV).scatter_(1, rows_NA, 1.0)
            h_NV = FORMS[self.form](logits_NV) * mask_NV
            y_ND = wide(torch.matmul(h_NV.to(kind), w_out))
            if self.form == "after":
                y_ND = F.gelu(y_ND)
        logits_NTL = logits_NV.gather(1, rows_NA).view(nodes_NTL.shape)
        return y_ND.to(kind), logits_NTL, nodes_NTL.to(torch.int32)


def ternary_like(layer: FFF) -> FFF:
    """Ternary trees of the same sizes, with the activation of all ternary layers."""
    return FFF(
        layer.hidden, layer.out, trees=layer.trees, depth=layer.depth, linear="ternary",
        activation="silu",
    )  # fmt: skip


def exchange(model: Any, name: str) -> None:
    """Give a model's channel mixers the form that `name`, one of EXCHANGES, says; in place."""
    if name != "ternary":
        assert replace_trees(model, lambda layer: SymmetricFFF.like(layer, name)), "no trees"
    elif not replace_trees(model, ternary_like):
        for block in model.layers:
            size, inner = block.channel.up_proj.weight.shape[::-1]
            block.channel = FFN(size, inner, linear="ternary", activation="silu")
            for linear in (block.channel.up_proj, block.channel.down_proj):
                model._init_weights(linear)
