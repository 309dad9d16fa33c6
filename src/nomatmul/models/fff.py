"""FFF, the fast feedforward layer of arXiv 2311.10770, and what its training needs.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L = depth + 1 levels, V nodes of all trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nomatmul.models.layers import FFN, RMSNorm
from nomatmul.ops import fff as ops
from nomatmul.ops.bitlinear import new_slot
from nomatmul.ops.fff.ternary import ternary_fff


@dataclass(frozen=True)
class FFFTraining:
    """How FFF layers train; `set_fff_training` hands it to every layer of a model.

    balance: weight of the load-balancing loss. route_gradient: give decisions a gradient
    (`nomatmul.ops.fff.surrogate`). count_usage: count visits, for `usage`.

    Raises ValueError naming the value and the limit.
    """

    balance: float = 0.0
    route_gradient: bool = False
    count_usage: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.balance) and self.balance >= 0):
            raise ValueError(f"balance {self.balance} must be finite and at least 0")


@dataclass(frozen=True)
class Usage:
    """What a layer's visits say since counting began.

    tokens: how many walked; entropy: of the visits of the last level, as a share of the greatest
    possible one, mean over trees (1: all ends of a tree equally used, 0: one of them); dead: share
    of all nodes that nobody visited; visits: int64 [T, nodes].
    """

    tokens: int
    entropy: float
    dead: float
    visits: Tensor


class TreeLayer(nn.Module):
    """What every form of trees has: the training plan, visit counts, the auxiliary loss."""

    training_plan = FFFTraining()
    visits: Tensor | None

    def __init__(self, trees: int, ends: int) -> None:
        super().__init__()
        self.trees = trees
        self.ends = ends  # places of a tree where a walk can end
        self.auxiliary: Tensor | None = None
        self.register_buffer("visits", None, persistent=False)

    def plan_training(self, plan: FFFTraining) -> None:
        """Train by this plan from now on; visits counted so far stay if counting goes on."""
        self.training_plan = plan
        if plan.count_usage != (self.visits is not None):
            self.count_usage(plan.count_usage)

    def _counted(self) -> int:
        raise NotImplementedError

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def count_usage(self, on: bool = True) -> None:
        """Start to count visits from zero, in training and evaluation, or stop."""
        size = (self._counted(),)
        self.visits = torch.zeros(size, dtype=torch.int64, device=self._device()) if on else None

    @torch.no_grad()
    def _count(self, rows: Tensor) -> None:
        if self.visits is not None and not recomputing():
            flat = rows.flatten().long()
            self.visits.index_add_(0, flat, torch.ones_like(flat))

    def _keep(self, loss: Tensor | None) -> None:
        # a recomputed loss has no reader, and would keep what recomputing gave up
        if not recomputing():
            self.auxiliary = loss

    @torch.no_grad()
    def usage(self) -> Usage:
        """What the counts say. Raises ValueError if nothing was counted."""
        if self.visits is None or not bool(self.visits.any()):
            raise ValueError("no visits were counted: call count_usage() and run some tokens first")
        visits = self.visits.view(self.trees, -1)
        ends = visits[:, -self.ends :].double()
        tokens = int(ends[0].sum())
        entropy = 1.0
        if self.ends > 1:
            share = ends / ends.sum(-1, keepdim=True)
            entropy = float(torch.special.entr(share).sum(-1).mean()) / math.log(self.ends)
        return Usage(tokens, entropy, float((visits == 0).double().mean()), visits.clone())


def balance_loss(logits_NTL: Tensor, nodes_NTL: Tensor, rows: int) -> Tensor:
    """Load balancing of decisions, a scalar: 1 where every node sends half of its visitors right.

    For each decision node, the product that Switch transformers use for experts (arXiv 2101.03961,
    eq. 4), of its two sides: 2 * sum over sides of (share of visitors sent there) * (mean sigmoid
    of visitors for that side), averaged over nodes by visitors, levels and trees. Shares are
    constants, so the gradient pushes the crowded side's logits down. Only visited nodes count.
    rows: V. A tree without decisions has loss 0.
    """
    decisions = logits_NTL.shape[-1] - 1
    if decisions == 0 or logits_NTL.shape[0] == 0:
        return logits_NTL.new_zeros(())
    z_NTM, nodes_NTM = logits_NTL[..., :decisions], nodes_NTL[..., :decisions].long()
    with torch.no_grad():
        flat = nodes_NTM.flatten()
        # int32 holds a token a node; for int64 torch.compile has no atomic sum and sorts instead
        counts = torch.zeros(2, rows, dtype=torch.int32, device=z_NTM.device)
        counts[0].index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        counts[1].index_add_(0, flat, (z_NTM > 0).flatten().int())
        right_V = counts[1].to(z_NTM.dtype) / counts[0].clamp(min=1).to(z_NTM.dtype)
        right_NTM = right_V[nodes_NTM]
    soft_NTM = torch.sigmoid(z_NTM)
    return 2 * (right_NTM * soft_NTM + (1 - right_NTM) * (1 - soft_NTM)).mean()


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

    initial_std: float | None = None  # set by models: normal weights instead of the authors' own

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
        ops.check_activation(activation)
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
            implementation=self.implementation,
        )
        return y.to(result_type(x_NK)), logits, nodes

    def extra_repr(self) -> str:
        return (
            f"{self.hidden}, {self.out}, trees={self.trees}, depth={self.depth}, {self.linear}, "
            f"{self.activation}, bias={self.bias is not None}"
        )


def recomputing() -> bool:
    """Does this forward pass run inside a backward pass, for activation checkpointing?"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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


def set_fff_training(model: nn.Module, plan: FFFTraining) -> int:
    """Hand the plan to every FFF layer inside model; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, TreeLayer)]
    for layer in layers:
        layer.plan_training(plan)
    return len(layers)


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary losses of the last forward pass of every FFF layer, summed; a scalar.

    They are taken away, so that nothing stale is added twice; zero if no layer has one.
    """
    layers = [module for module in model.modules() if isinstance(module, TreeLayer)]
    losses = [layer.auxiliary for layer in layers if layer.auxiliary is not None]
    for layer in layers:
        layer.auxiliary = None
    if not losses:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(losses).sum()
