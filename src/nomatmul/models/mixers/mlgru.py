"""MLGRU, the token mixer without matrix products (arXiv 2406.02528, section 3.3).

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.models.layers import RMSNorm, is_ternary, make_linear, shared_rms
from nomatmul.ops.mlgru import mlgru_scan


class MLGRU(nn.Module):
    """A gated linear recurrence: h_t = f_t * h_(t-1) + silu(i_t) * (1 - f_t), element-wise.

    The output is o_proj(RMSNorm(g) * silu(h)): the norm is on the gate g, the activation on the
    state. Gates and state are float32 under autocast.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        linear: str = "ternary",
        eps: float = 1e-6,
        gate_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.f_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.g_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.g_norm = RMSNorm(hidden_size, gate_norm_eps)
        self.o_proj = make_linear(hidden_size, hidden_size, linear, eps)

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
        if not is_ternary(self.o_proj):
            mixed = mixed.to(g.dtype)
        return self.o_proj(mixed).to(g.dtype), last
