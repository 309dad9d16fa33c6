"""Trees of gated neurons, those of a GLU (arXiv 2002.05202): tried, and not kept (page.md).

    model = CausalLM(config)  # with channel_mixer "fff"
    replace_trees(model, GatedFFF.like)

The second half of a node is computed from the products of all rows, as `masked` does.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels of a tree, V rows of all trees.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nomatmul.models import FFF
from nomatmul.models.channels.fff import result_type
from nomatmul.ops import fff as ops
from nomatmul.ops.bitlinear import new_slot
from nomatmul.ops.bitlinear.steps import root, wide
from nomatmul.ops.fff.ternary import straight_ternary
from studies.fff.layers import straight_int8


class GatedFFF(FFF):
    """`FFF` whose node adds activation(logit) * (x . w_up[row]) * w_out[row].

    Arguments and parameters as `FFF`, and w_up [V, hidden]. No gradient of decisions.
    """

    def __init__(self, hidden: int, out: int | None = None, **options: Any) -> None:
        super().__init__(hidden, out, **options)
        self.w_up = nn.Parameter(torch.empty_like(self.w_in))
        self.up_slot = new_slot()
        self.reset_parameters()

    @classmethod
    def like(cls, layer: FFF) -> GatedFFF:
        """A layer of the sizes of `layer`."""
        return cls(
            layer.hidden,
            layer.out,
            trees=layer.trees,
            depth=layer.depth,
            linear=layer.linear,
            activation=layer.activation,
            bias=layer.bias is not None,
            eps=layer.eps,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "w_up" not in self._parameters:  # FFF's constructor comes here before there is one
            return
        if self.initial_std is not None:
            nn.init.normal_(self.w_up, 0.0, self.initial_std)
        else:
            bound = 1 / math.sqrt(self.hidden)
            nn.init.uniform_(self.w_up, -bound, bound)

    def walk_and_sum(self, x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training_plan.route_gradient:
            raise ValueError("GatedFFF: route_gradient belongs to nodes without a gate")
        kind = result_type(x_NK)
        walk = self._ternary if self.linear == "ternary" else self._dense
        with torch.autocast(x_NK.device.type, enabled=False):
            y_ND, logits_NTL, nodes_NTL = walk(x_NK.to(kind), self.w_up)
        return y_ND.to(kind), logits_NTL, nodes_NTL

    def _walk(self, x_NK: Tensor, w_in_VK: Tensor) -> tuple[Tensor, Tensor]:
        how = {"trees": self.trees, "depth": self.depth, "implementation": self.implementation}
        return ops.walk(x_NK, w_in_VK.to(x_NK.dtype), self.bias, **how)

    def _dense(self, x_NK: Tensor, w_up_VK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_NTL, nodes_NTL = self._walk(x_NK, self.w_in)
        h_NTL = ops.activate(logits_NTL, self.activation) * project(x_NK, nodes_NTL, w_up_VK)
        w_out = self.w_out.to(x_NK.dtype)
        y_ND = ops.combine(h_NTL, nodes_NTL, w_out, implementation=self.implementation)
        return y_ND, logits_NTL, nodes_NTL

    def _ternary(self, x_NK: Tensor, w_up_VK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `ternary_fff`: both sides of the trees read int8 values, all weights are ternary."""
        x_NK = wide(x_NK)
        q_NK, step_N1 = straight_int8(x_NK / root(x_NK, self.eps) * wide(self.norm_in.weight))
        t_in, w_scale_in = straight_ternary(self.w_in, self.slots[0], x_NK.dtype)
        t_up, w_scale_up = straight_ternary(w_up_VK, self.up_slot, x_NK.dtype)
        t_out, w_scale_out = straight_ternary(self.w_out, self.slots[1], x_NK.dtype)
        acc_NTL, nodes_NTL = self._walk(q_NK, t_in)
        logits_NTL = acc_NTL * (w_scale_in * step_N1).unsqueeze(-1)
        up_NTL = project(q_NK, nodes_NTL, t_up) * (w_scale_up * step_N1).unsqueeze(-1)
        h_NA = (ops.activate(logits_NTL, self.activation) * up_NTL).flatten(1)
        norm_NA = wide(self.norm_out.weight)[nodes_NTL.flatten(1).long()]
        q_NA, step_N1 = straight_int8(h_NA / root(h_NA, self.eps) * norm_NA)
        q_NTL = q_NA.view(nodes_NTL.shape)
        acc_ND = ops.combine(q_NTL, nodes_NTL, t_out, implementation=self.implementation)
        return acc_ND * (w_scale_out * step_N1), logits_NTL, nodes_NTL


def project(x_NK: Tensor, nodes_NTL: Tensor, w_VK: Tensor) -> Tensor:
    """[N, T, L]: x[n] . w[nodes[n, t, l]], float32 (float64 for float64)."""
    products_NV = wide(torch.matmul(x_NK, w_VK.t().to(x_NK.dtype)))
    return products_NV.gather(1, nodes_NTL.flatten(1).long()).view(nodes_NTL.shape)
