"""FFF, the fast feedforward layer of arXiv 2311.10770; what its training needs is in trees.py.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L = depth + 1 levels, V nodes of all trees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.models.channels.ffn import FFN
from nomatmul.models.channels.trees import TreeLayer, balance_loss
from nomatmul.models.layers import RMSNorm
from nomatmul.ops import fff as ops
from nomatmul.ops.bitlinear import new_slot
from nomatmul.ops.fff.ternary import ternary_fff


class FFF(TreeLayer):
    """Feed-forward layer of binary trees: a token visits depth + 1 nodes a tree and no others.

    y = sum over visited nodes of activation(x . w_in[row] + bias[row]) * w_out[row]; a walk begins
    at each tree's root and goes right where the logit is above zero. Only visited rows are read,
    forward and backward. Source: arXiv 2311.10770 (UltraFastBERT); its 1x11 is trees=1, depth=11.

    hidden: inputs; out: outputs (None: as many). depth: decisions of a walk; a tree has
    2^(depth+1) - 1 nodes. linear: "dense", or "ternary" (BitLinear's quantisers on both sides, so
    decisions are made on whole numbers; no bias). activation: "gelu" (exact), "silu", "relu". bias:
    of the nodes, as the authors have it. master_width: an always active FFN of this width beside
    the trees (the master leaf of arXiv 2405.16836). eps: of the norms of a ternary layer.
    implementation: see `nomatmul.ops.fff`.

    Parameters: w_in [V, hidden], w_out [V, out], bias [V]; ternary: norm_in.weight [hidden],
    norm_out.weight [V]; `master`. Row t * nodes + j is node j of tree t. Raises ValueError for
    sizes and names that do not fit.
    """

    def __init__(
        self,
        hidden: int,
        out: int | None = None,
        *,
        trees: int = 1,
        depth: int,
        linear: str = "dense",
        activation: str = "gelu",
        bias: bool = False,
        master_width: int = 0,
        eps: float = 1e-6,
        implementation: str | None = None,
    ) -> None:
        check_tree_sizes(hidden, out, trees, depth, linear, bias, master_width)
        super().__init__(trees, 1 << depth)
        ops.check_activation(activation, ops.ACTIVATIONS)
        self.hidden, self.out, self.depth = hidden, out or hidden, depth
        self.linear, self.activation, self.eps = linear, activation, eps
        self.implementation = implementation
        rows = trees * ((2 << depth) - 1)
        self.w_in = nn.Parameter(torch.empty(rows, hidden))
        self.w_out = nn.Parameter(torch.empty(rows, self.out))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        if linear == "ternary":
            self.norm_in = RMSNorm(hidden, eps)
            self.norm_out = RMSNorm(rows, eps)
            self.slots = (new_slot(), new_slot())
        self.master = make_master(hidden, self.out, master_width, linear, eps, activation)
        self.reset_parameters()

    @classmethod
    def of(cls, part: parts.FFF, layer: int) -> FFF:
        """The layer of a description; `layer` is ignored."""
        return cls(
            part.size,
            trees=part.trees,
            depth=part.depth,
            linear=part.linear,
            activation=part.activation,
            bias=part.bias,
            master_width=part.master.up_proj.outputs if part.master is not None else 0,
            eps=part.norm_eps,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden), w_out in +-1/sqrt(visited nodes), as the authors draw.

        Their whole models then draw every matrix anew, normal, with biases at zero: `initial_std`.
        Norms and the master leaf are modules of their own and not touched.
        """
        if self.initial_std is not None:
            nn.init.normal_(self.w_in, 0.0, self.initial_std)
            nn.init.normal_(self.w_out, 0.0, self.initial_std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        bound = 1 / math.sqrt(self.hidden)
        nn.init.uniform_(self.w_in, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        bound = 1 / math.sqrt(self.trees * (self.depth + 1))
        nn.init.uniform_(self.w_out, -bound, bound)

    def _counted(self) -> int:
        return self.w_in.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> [..., out] in x's type, or autocast's. ValueError for NaN logits."""
        flat = x.reshape(-1, x.shape[-1])
        y, logits, nodes = self.walk_and_sum(flat)
        self._count(nodes)
        plan = self.training_plan
        loss = None
        if self.training and plan.balance and torch.is_grad_enabled():
            loss = plan.balance * balance_loss(logits, nodes, self.w_in.shape[0])
        self._keep(loss)
        if self.master is not None:
            y = y + self.master(flat)
        return y.view(*x.shape[:-1], self.out)

    def walk_and_sum(self, x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trees alone: (y [N, out], logits [N, T, L], visited rows int32 [N, T, L])."""
        route = self.training_plan.route_gradient
        if self.linear == "dense":
            return ops.fff(
                x_NK,
                self.w_in,
                self.w_out,
                self.bias,
                trees=self.trees,
                depth=self.depth,
                activation=self.activation,
                route_gradient=route,
                implementation=self.implementation,
            )
        y, logits, nodes = ternary_fff(
            x_NK,
            self.w_in,
            self.w_out,
            self.norm_in.weight,
            self.norm_out.weight,
            trees=self.trees,
            depth=self.depth,
            eps=self.eps,
            activation=self.activation,
            route_gradient=route,
            slots=self.slots,
            full_precision=self.full_precision,
            implementation=self.implementation,
        )
        return y.to(result_type(x_NK)), logits, nodes

    def extra_repr(self) -> str:
        return (
            f"{self.hidden}, {self.out}, trees={self.trees}, depth={self.depth}, {self.linear}, "
            f"{self.activation}, bias={self.bias is not None}"
        )


def result_type(x: Tensor) -> torch.dtype:
    """Type of a layer's output: autocast's where it is on, else x's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def make_master(
    hidden: int, out: int, width: int, linear: str, eps: float, activation: str
) -> FFN | None:
    """The always active FFN beside the trees, None for width 0."""
    if width == 0:
        return None
    return FFN(hidden, width, out_size=out, linear=linear, eps=eps, activation=activation)


def check_tree_sizes(
    hidden: int, out: int | None, trees: int, depth: int, linear: str, bias: bool, master: int
) -> None:
    """Raise ValueError, naming value and limit, for a layer that cannot be."""
    sizes = {"hidden": hidden, "out": hidden if out is None else out, "trees": trees}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"FFF: {name} is {value}, it must be at least 1")
    if not 0 <= depth <= ops.MAX_DEPTH:
        raise ValueError(f"FFF: depth is {depth}, it must lie in 0..{ops.MAX_DEPTH}")
    if trees * (2 << depth) > ops.MAX_ROWS:
        raise ValueError(
            f"FFF: {trees} trees of depth {depth} have more nodes than int32 can number "
            f"({ops.MAX_ROWS})"
        )
    if master < 0:
        raise ValueError(f"FFF: master_width is {master}, it must be at least 0")
    if linear not in ("dense", "ternary"):
        raise ValueError(f"FFF: linear {linear!r} is not known: use 'dense' or 'ternary'")
    if bias and linear == "ternary":
        raise ValueError("FFF: a ternary layer has no bias")
