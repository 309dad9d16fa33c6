"""MLGRU, the token mixer without matrix products (arXiv 2406.02528, section 3.3).

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import LayerNorm, RMSNorm, make_linear, rounds_itself, shared_rms
from nomatmul.models.mixer import Inputs, Pass, TokenMixer, bit_linears_of, own_layers
from nomatmul.ops import fused
from nomatmul.ops.mlgru import mlgru_scan


class MLGRU(TokenMixer):
    """A gated linear recurrence: h_t = f_t * h_(t-1) + silu(i_t) * (1 - f_t), element-wise.

    The output is o_proj(RMSNorm(g) * silu(h)): the norm is on the gate g, the activation on the
    state. Gates and state are float32 under autocast.
    """

    @classmethod
    def has_fused(cls, part: parts.MLGRU) -> bool:
        return True

    def __init__(
        self,
        hidden_size: int,
        *,
        linear: str = "ternary",
        eps: float = 1e-6,
        gate_norm_eps: float = 1e-5,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_size, self.layer = hidden_size, layer
        self.i_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.f_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.g_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.g_norm = RMSNorm(hidden_size, gate_norm_eps)
        self.o_proj = make_linear(hidden_size, hidden_size, linear, eps)

    @classmethod
    def of(cls, part: parts.MLGRU, layer: int) -> MLGRU:
        linear = part.i_proj
        return cls(
            linear.inputs,
            linear=linear.kind,
            eps=linear.norm_eps or 1e-6,
            gate_norm_eps=part.g_norm.eps,
            layer=layer,
        )

    def plan_weights(self, std: float, residual_std: float) -> None:
        """Nothing: all four projections stay Xavier-uniform, as the authors draw them."""

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        lower_bound: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. See `step` for the arguments; drops the last state."""
        return self.step(x, attention_mask, lower_bound, state)[0]

    def step(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        lower_bound: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output [B, T, D] and the state after the last step, float32 [B, D].

        attention_mask: [B, T], 0 where a position is padding, anywhere in a row: the state stays as
        it was there.
        lower_bound: [D] in [0, 1), what the forget gate cannot fall below; None means zero.
        state: float32 [B, D] from an earlier call; None means zeros.
        """
        rms = shared_rms(x, self.i_proj)
        f = torch.sigmoid(self.f_proj(x, rms).float())
        if lower_bound is not None:
            bound = lower_bound.float()
            f = bound + (1.0 - bound) * f
        i = F.silu(self.i_proj(x, rms).float()) * (1.0 - f)
        if attention_mask is not None:  # such a step adds nothing and forgets nothing
            real_BT1 = attention_mask.unsqueeze(-1)
            i = i * real_BT1.to(i.dtype)
            f = torch.where(real_BT1.bool(), f, 1.0)
        h, last = mlgru_scan(i, f, state)
        g = self.g_proj(x, rms)
        mixed = self.g_norm(g.float()) * F.silu(h)
        if not rounds_itself(self.o_proj):
            mixed = mixed.to(g.dtype)
        return self.o_proj(mixed).to(g.dtype), last

    # -- in a block -----------------------------------------------------------------------------

    def inputs(self, tokens: Pass) -> Inputs:
        """The mask of the new steps [B, T] and the lower bound [D]."""
        return tokens.new_mask(), tokens.lower_bound(self.layer)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        """cache: a StateCache; the state is its piece "h"."""
        mask, lower_bound = inputs
        state = cache.states[self.layer].get("h") if cache is not None else None
        mixed, last = self.step(x, mask, lower_bound, state)
        if cache is not None:
            cache.states[self.layer]["h"] = last
        return mixed

    def fuses(self, inputs: Inputs = (None, None)) -> bool:
        return inputs[0] is None and own_layers(self)

    def fused(
        self, x: Tensor, norm: RMSNorm | LayerNorm, inputs: Inputs = (None, None), *, keep: bool
    ) -> Tensor:
        layers = bit_linears_of(self.i_proj, self.f_proj, self.g_proj, self.o_proj)
        return fused.mixer(
            x,
            norm.weight,
            [layer.weight for layer in layers],
            [layer.norm.weight for layer in layers],
            self.g_norm.weight,
            inputs[1],
            eps=(norm.eps, layers[0].norm.eps, self.g_norm.eps),
            slots=(layers[0].slot, layers[3].slot),
            keep=keep,
            full_precision=layers[0].full_precision,
        )
