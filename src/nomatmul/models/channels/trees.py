"""What the training of trees needs: the plan, visit counts, the auxiliary loss.

Shape suffixes: N tokens, T trees, L = depth + 1 levels, V nodes of all trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nomatmul.models.mixer import Mixer


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


class TreeLayer(Mixer):
    """What every form of trees has: the training plan, visit counts, the auxiliary loss."""

    initial_std: float | None = None  # set by models: normal weights instead of the authors' own
    training_plan = FFFTraining()
    full_precision: bool = False  # ternary rows are multiplied as they are
    implementation: str | None
    visits: Tensor | None

    def __init__(self, trees: int, ends: int) -> None:
        super().__init__()
        self.trees = trees
        self.ends = ends  # places of a tree where a walk can end
        self.auxiliary: Tensor | None = None
        self.register_buffer("visits", None, persistent=False)

    def plan_weights(self, std: float, residual_std: float) -> None:
        """Rows in and out are drawn alike: residual_std is ignored."""
        self.initial_std = std

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


def recomputing() -> bool:
    """Does this forward pass run inside a backward pass, for activation checkpointing?"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
