"""The leaf form of FFF (arXiv 2308.14711): hyperplanes choose a leaf, a leaf is a small network.

Tried, and not kept (page.md).

    model = CausalLM(config)  # with channel_mixer "fff"
    replace_trees(model, lambda layer: LeafFFF(layer.hidden, leaf_width=64, depth=5))
    model.set_fff_training(LeafTraining(hardening=0.01))

Shape suffixes: N tokens, K inputs, D outputs, T trees, M = 2^depth - 1 hyperplanes of a tree, F
leaves of a tree (2^depth), W width of a leaf.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.models.channels.fff import check_tree_sizes, make_master, result_type
from nomatmul.models.channels.trees import FFFTraining, TreeLayer
from nomatmul.models.layers import RMSNorm
from nomatmul.ops import fff as ops
from nomatmul.ops.bitlinear import new_slot
from nomatmul.ops.bitlinear.steps import root, wide
from nomatmul.ops.fff.operators import check_logits
from nomatmul.ops.fff.ternary import straight_ternary
from studies.fff.layers import straight_int8
from studies.fff.leaf_mixture import LeafTraining, hard_leaves, mixture


class LeafFFF(TreeLayer):
    """Feed-forward layer of trees whose inner nodes only decide and whose leaves compute.

    Inference: from each tree's root, right where x . nodes[row] + node_bias[row] > 0; the leaf at
    the end, a network hidden -> leaf_width -> out, gives the tree's output; trees are summed.
    Tokens are grouped by leaf, and no other leaf is touched.

    Training mixes all leaves: a node sends sigmoid(logit) of a token right, the rest left, and a
    leaf's output counts by the product of the shares on its path. That is dense work, as in the
    paper. The plan (`LeafTraining`) adds `hardening` * sum over nodes of the mean entropy of their
    shares, in nats (eq. of section 3 there); swaps left and right of a node for a token with
    probability `region_leak`; and moves shares s to s + hardness * ([logit > 0] - s), from the soft
    mixture at 0 to the one leaf of inference at 1 (the step has no gradient). With hardness 1 and
    no other term, training computes one leaf a tree, like inference; nodes then learn only through
    `route_gradient`. `balance` weighs the load-balancing loss of leaves: F * sum of (share of
    tokens whose hard path ends there) * (mean mixture weight), mean over trees (arXiv 2101.03961,
    eq. 4).

    hidden, out, trees, depth, linear, activation, bias, master_width, eps: as `FFF`; depth counts
    decisions. linear "ternary": nodes and leaves are ternary, read one int8 input, and each leaf's
    hidden values have a norm and an int8 scale of their own.

    Parameters: nodes [T*M, K], leaf_in [T*F, W, K], leaf_out [T*F, D, W]; with bias node_bias,
    leaf_in_bias [T*F, W], leaf_out_bias [T*F, D]; ternary: norm_in.weight [K], norm_out.weight
    [T*F*W]; `master`. Raises ValueError for sizes and names that do not fit.
    """

    training_plan: LeafTraining = LeafTraining()
    one_leaf = False  # in training too

    def __init__(
        self,
        hidden: int,
        out: int | None = None,
        *,
        leaf_width: int,
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
        if leaf_width < 1:
            raise ValueError(f"FFF: leaf_width is {leaf_width}, it must be at least 1")
        leaves = trees << depth
        super().__init__(trees, 1 << depth)
        ops.check_activation(activation)
        self.hidden, self.out, self.depth = hidden, out or hidden, depth
        self.leaf_width, self.linear, self.activation = leaf_width, linear, activation
        self.eps = eps
        self.implementation = implementation
        nodes = trees * ((1 << depth) - 1)
        self.nodes = nn.Parameter(torch.empty(nodes, hidden))
        self.leaf_in = nn.Parameter(torch.empty(leaves, leaf_width, hidden))
        self.leaf_out = nn.Parameter(torch.empty(leaves, self.out, leaf_width))
        self.node_bias = nn.Parameter(torch.empty(nodes)) if bias else None
        self.leaf_in_bias = nn.Parameter(torch.empty(leaves, leaf_width)) if bias else None
        self.leaf_out_bias = nn.Parameter(torch.empty(leaves, self.out)) if bias else None
        if linear == "ternary":
            self.norm_in = RMSNorm(hidden, eps)
            self.norm_out = RMSNorm(leaves * leaf_width, eps)
            self.slots = (new_slot(), new_slot(), new_slot())
        self.master = make_master(hidden, self.out, master_width, linear, eps, activation)
        # a tensor, so that a recorded CUDA graph and a compiled model see it move
        self.hardness: Tensor | None
        self.register_buffer("hardness", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden), leaf_out in +-1/sqrt(leaf_width), as the authors draw."""
        for size, weights, biases in (
            (self.hidden, (self.nodes, self.leaf_in), (self.node_bias, self.leaf_in_bias)),
            (self.leaf_width, (self.leaf_out,), (self.leaf_out_bias,)),
        ):
            bound = 1 / math.sqrt(size)
            for weight in weights:
                if self.initial_std is None:
                    nn.init.uniform_(weight, -bound, bound)
                else:
                    nn.init.normal_(weight, 0.0, self.initial_std)
            for bias in biases:
                if bias is not None and self.initial_std is None:
                    nn.init.uniform_(bias, -bound, bound)
                elif bias is not None:
                    nn.init.zeros_(bias)

    def plan_training(self, plan: FFFTraining) -> None:
        if not isinstance(plan, LeafTraining):
            plan = LeafTraining(**dataclasses.asdict(plan))
        super().plan_training(plan)
        if self.hardness is None:
            self.hardness = torch.zeros((), device=self._device())
        self.hardness.fill_(plan.hardness)
        # decided here, not in `forward`: a compiled model would see a new number at every step
        extra = plan.balance or plan.hardening or plan.region_leak
        self.one_leaf = plan.hardness >= 1 and not extra

    def _counted(self) -> int:
        return self.leaf_in.shape[0]

    # -- parts of both passes ------------------------------------------------------------------

    def _inputs(self, x_NK: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first products read, [N, K], and the value of one unit [N, 1] if it is int8."""
        if self.linear == "dense":
            return x_NK.to(result_type(x_NK)), None
        x_NK = wide(x_NK)
        y_NK = x_NK / root(x_NK, self.eps) * wide(self.norm_in.weight)
        return straight_int8(y_NK)

    def _weights(self, which: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Nodes (0), leaf_in (1) or leaf_out (2) in dtype; ternary ones with their scale []."""
        weight = (self.nodes, self.leaf_in, self.leaf_out)[which]
        if self.linear == "dense":
            return weight.to(dtype), None
        t, w_scale = straight_ternary(weight.flatten(0, -2), self.slots[which], dtype)
        return t.view(weight.shape), w_scale

    def _hidden(self, acc: Tensor, leaves: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What leaf_out reads, [..., W], and the value of one unit [..., 1] if it is int8.

        acc: scaled products with leaf_in; leaves: which leaf each row is, None for [N, T*F, W].
        """
        if self.leaf_in_bias is not None:
            bias = self.leaf_in_bias.to(acc.dtype)
            acc = acc + (bias if leaves is None else bias[leaves])
        h = ops.activate(acc, self.activation)
        if self.linear == "dense":
            return h, None
        norm = wide(self.norm_out.weight).view(-1, self.leaf_width)
        z = h / root(h, self.eps) * (norm if leaves is None else norm[leaves])
        return straight_int8(z)

    # -- one leaf ------------------------------------------------------------------------------

    def _walk(self, u_NK: Tensor, step: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Logits [N, T, depth] of the nodes on the path (None without any), leaves int64 [N, T]."""
        trees = torch.arange(self.trees, device=u_NK.device)
        if self.depth == 0:
            return None, trees.expand(len(u_NK), -1)
        nodes, w_scale = self._weights(0, u_NK.dtype)
        z_NTL, rows_NTL = ops.walk(
            u_NK,
            nodes,
            self.node_bias,
            trees=self.trees,
            depth=self.depth - 1,
            implementation=self.implementation,
        )
        size = self.ends - 1
        last_NT = rows_NTL[..., -1].long() - trees * size
        leaf_NT = 2 * last_NT + 1 + (z_NTL[..., -1] > 0).long() - size
        if step is not None and w_scale is not None:
            z_NTL = z_NTL * (w_scale * step).unsqueeze(-1)
        return z_NTL, leaf_NT + trees * self.ends

    def _hard(self, x_NK: Tensor) -> Tensor:
        """One leaf a tree, [N, D]; tokens are brought together by leaf, P = N * T pairs."""
        u_NK, step_N1 = self._inputs(x_NK)
        z_NTL, leaf_NT = self._walk(u_NK, step_N1)
        self._count(leaf_NT)
        order_P = torch.argsort(leaf_NT.flatten(), stable=True)
        leaf_P, token_P = leaf_NT.flatten()[order_P], order_P // self.trees
        sizes = torch.bincount(leaf_P, minlength=len(self.leaf_in)).tolist()

        weight, w_scale = self._weights(1, u_NK.dtype)
        acc_PW = _by_leaf(u_NK[token_P], weight, sizes)
        if step_N1 is not None and w_scale is not None:
            acc_PW = acc_PW * (w_scale * step_N1[token_P])
        v_PW, step_P1 = self._hidden(acc_PW, leaf_P)
        weight, w_scale = self._weights(2, v_PW.dtype)
        y_PD = _by_leaf(v_PW, weight, sizes)
        if step_P1 is not None and w_scale is not None:
            y_PD = y_PD * (w_scale * step_P1)
        if self.leaf_out_bias is not None:
            y_PD = y_PD + self.leaf_out_bias.to(y_PD.dtype)[leaf_P]
        y_NTD = y_PD[torch.argsort(order_P)].view(len(x_NK), self.trees, self.out)
        if self.training_plan.route_gradient and z_NTL is not None:
            share_NT = torch.sigmoid(z_NTL.abs()).sum(-1)
            y_NTD = y_NTD * (1 + (share_NT - share_NT.detach())).unsqueeze(-1).to(y_NTD.dtype)
        return y_NTD.sum(1)

    # -- all leaves ----------------------------------------------------------------------------

    def _soft(self, x_NK: Tensor) -> Tensor:
        """The mixture of all leaves, [N, D]; sets the auxiliary loss."""
        u_NK, step_N1 = self._inputs(x_NK)
        z_NTM = self._all_logits(u_NK, step_N1)
        mix_NTF = mixture(self._shares(z_NTM))
        self._observe(z_NTM, mix_NTF)

        weight, w_scale = self._weights(1, u_NK.dtype)
        acc_NR = F.linear(u_NK, weight.flatten(0, 1))
        if step_N1 is not None and w_scale is not None:
            acc_NR = acc_NR * (w_scale * step_N1)
        v_NFW, step_NF1 = self._hidden(acc_NR.unflatten(-1, (-1, self.leaf_width)), None)
        mix_NF = mix_NTF.flatten(1)
        weight, w_scale = self._weights(2, v_NFW.dtype)
        if step_NF1 is not None and w_scale is not None:
            v_NFW = v_NFW * (w_scale * step_NF1)
        v_NFW = v_NFW * mix_NF.unsqueeze(-1).to(v_NFW.dtype)
        y_ND = F.linear(v_NFW.flatten(1), weight.permute(1, 0, 2).flatten(1))
        if self.leaf_out_bias is not None:
            y_ND = y_ND + torch.matmul(mix_NF, wide(self.leaf_out_bias)).to(y_ND.dtype)
        return y_ND

    def _all_logits(self, u_NK: Tensor, step_N1: Tensor | None) -> Tensor:
        """[N, T, M]; a leaf without decisions above it has M = 0."""
        if self.depth == 0:
            return wide(u_NK).new_zeros(len(u_NK), self.trees, 0)
        nodes, w_scale = self._weights(0, u_NK.dtype)
        z_NM = wide(F.linear(u_NK, nodes))
        if self.node_bias is not None:
            z_NM = z_NM + wide(self.node_bias)
        if step_N1 is not None and w_scale is not None:
            z_NM = z_NM * (w_scale * step_N1)
        if not torch.compiler.is_compiling():
            check_logits(z_NM)
        return z_NM.unflatten(-1, (self.trees, -1))

    def _shares(self, z_NTM: Tensor) -> Tensor:
        """Share of each token that each node sends right, after hardness and leak."""
        share_NTM = torch.sigmoid(z_NTM)
        if self.hardness is not None:
            step_NTM = (z_NTM.detach() > 0).to(share_NTM.dtype)
            share_NTM = share_NTM + self.hardness.to(share_NTM.dtype) * (step_NTM - share_NTM)
        leak = self.training_plan.region_leak
        if leak:
            swapped = (torch.rand_like(share_NTM) < leak).to(share_NTM.dtype)
            share_NTM = share_NTM + swapped * (1 - 2 * share_NTM)
        return share_NTM

    def _observe(self, z_NTM: Tensor, mix_NTF: Tensor) -> None:
        """Count hard leaves and set the auxiliary loss, as far as the plan asks for them."""
        plan = self.training_plan
        if self.visits is None and not plan.balance and not plan.hardening:
            return
        leaf_NT = hard_leaves(z_NTM.detach(), self.depth)
        self._count(leaf_NT + torch.arange(self.trees, device=leaf_NT.device) * self.ends)
        if not torch.is_grad_enabled() or self.depth == 0:
            return
        loss = z_NTM.new_zeros(())
        if plan.balance:
            share_TF = F.one_hot(leaf_NT, self.ends).to(mix_NTF.dtype).mean(0)
            loss = loss + plan.balance * self.ends * (share_TF * mix_NTF.mean(0)).sum(-1).mean()
        if plan.hardening:
            entropy_NTM = F.softplus(z_NTM) - z_NTM * torch.sigmoid(z_NTM)
            loss = loss + plan.hardening * entropy_NTM.mean(0).sum()
        self._keep(loss)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> [..., out] in x's type, or autocast's. ValueError for NaN logits.

        All leaves in training, one a tree in evaluation or once the plan is hard.
        """
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[-1] != self.hidden:
            raise ValueError(f"FFF: x must be [..., {self.hidden}], got {tuple(x.shape)}")
        kind = result_type(flat)
        soft = self.training and not self.one_leaf
        self._keep(None)
        with torch.autocast(x.device.type, enabled=False):
            y = self._soft(flat.to(kind)) if soft else self._hard(flat.to(kind))
        y = y.to(kind)
        if self.master is not None:
            y = y + self.master(flat)
        return y.view(*x.shape[:-1], self.out)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden}, {self.out}, leaf_width={self.leaf_width}, trees={self.trees}, "
            f"depth={self.depth}, {self.linear}, {self.activation}"
        )


def _by_leaf(x_PK: Tensor, weight_FWK: Tensor, sizes: list[int]) -> Tensor:
    """x[p] @ weight[leaf of p].T, [P, W]; x is ordered by leaf, sizes[f] rows of leaf f."""
    weights = weight_FWK.unbind(0)  # its backward stacks once, an index would add V rows a leaf
    parts = [
        F.linear(x, weight) for x, weight in zip(x_PK.split(sizes), weights, strict=True) if len(x)
    ]
    return torch.cat(parts) if parts else x_PK.new_zeros(0, weight_FWK.shape[1])
