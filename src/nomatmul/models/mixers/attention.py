"""Self-attention: the token mixer of the Transformer++ twin (causal, rotary) and of the encoders.

Shape suffixes: B sequences, T new steps, S steps attended to, H heads, E elements of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import make_linear, shared_rms
from nomatmul.models.mixer import Inputs, Pass, TokenMixer


def rotary_angles(position_ids_BT: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, T, head_size/2], of the positions (RoPE, arXiv 2104.09864)."""
    exponent = torch.arange(0, head_size, 2, device=position_ids_BT.device).float() / head_size
    angle = position_ids_BT.float().unsqueeze(-1) * torch.pow(theta, -exponent)
    return angle.cos(), angle.sin()


def _rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotate element e with element e + E/2 (the half-split convention of Llama)."""
    cos, sin = cos_BTE.unsqueeze(1), sin_BTE.unsqueeze(1)
    first, second = x_BHTE.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_BHTE.dtype)


def attention_bias(mask_BS: Tensor, new: int) -> Tensor:
    """Boolean [B, 1, T, S]: may query t (the last `new` of S) look at key s?

    mask_BS: 1 for real positions, 0 for padding. A padded query looks at itself, so that no row
    is empty.
    """
    total = mask_BS.shape[1]
    device = mask_BS.device
    query_T = torch.arange(total - new, total, device=device)
    key_S = torch.arange(total, device=device)
    causal_TS = key_S[None, :] <= query_T[:, None]
    itself_TS = key_S[None, :] == query_T[:, None]
    return ((causal_TS & mask_BS.bool()[:, None, :]) | itself_TS).unsqueeze(1)


def padding_bias(mask_BT: Tensor) -> Tensor:
    """Boolean [B, 1, 1, T] for attention without direction: may anybody look at key t?

    mask_BT: 1 for real positions, 0 for padding, anywhere in the row. Padded queries look at the
    real keys too, and a row without any real position looks everywhere, as in crammed BERT, whose
    mask is a large negative number added to the scores of padded keys.
    """
    keep_BT = mask_BT.bool()
    return (keep_BT | ~keep_BT.any(-1, keepdim=True))[:, None, None, :]


class Attention(TokenMixer):
    """Multi-head attention, no biases; x: [B, T, D] -> [B, T, D].

    causal: each position sees itself and what lies before it; otherwise all positions. positions:
    "rotary" rotates queries and keys; with "sinusoidal" and "none" they stay as they are, for the
    position, if any, is in x. `dropout` is applied in training to the attention's weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        linear: str = "dense",
        eps: float = 1e-6,
        rope_theta: float = 10000.0,
        layer: int = 0,
        causal: bool = True,
        positions: str = "rotary",
    ) -> None:
        super().__init__()
        self.rotary = positions == "rotary"
        if hidden_size % num_heads or (self.rotary and (hidden_size // num_heads) % 2):
            even = "even" if self.rotary else "equal"
            raise ValueError(
                f"{num_heads} heads do not cut hidden_size {hidden_size} into {even} parts"
            )
        self.causal = causal
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.rope_theta = rope_theta
        self.layer = layer
        self.q_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.k_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.v_proj = make_linear(hidden_size, hidden_size, linear, eps)
        self.o_proj = make_linear(hidden_size, hidden_size, linear, eps)

    @classmethod
    def of(cls, part: parts.Attention, layer: int) -> Attention:
        linear, rotary = part.q_proj, part.theta is not None
        return cls(
            linear.inputs,
            part.heads,
            linear=linear.kind,
            eps=linear.norm_eps or 1e-6,
            rope_theta=part.theta or 10000.0,
            layer=layer,
            causal=part.causal,
            positions="rotary" if rotary else "none",
        )

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """bias: from `attention_bias` or `padding_bias`, None without padding and without a past.

        rotary: from `rotary_angles`, None for positions 0..T-1. cache: a transformers Cache that
        keeps keys and values of this layer, None for none.
        """
        batch, steps, _ = x.shape
        if rotary is None and self.rotary:
            positions = torch.arange(steps, device=x.device).unsqueeze(0)
            rotary = rotary_angles(positions, self.head_size, self.rope_theta)
        rms = shared_rms(x, self.q_proj)

        def split(projection: nn.Module) -> Tensor:
            y = projection(x, rms)
            return y.view(batch, steps, self.num_heads, self.head_size).transpose(1, 2)

        q_BHTE, k_BHSE, v_BHSE = split(self.q_proj), split(self.k_proj), split(self.v_proj)
        if rotary is not None and self.rotary:
            q_BHTE, k_BHSE = _rotate(q_BHTE, *rotary), _rotate(k_BHSE, *rotary)
        if cache is not None:
            k_BHSE, v_BHSE = cache.update(k_BHSE, v_BHSE, self.layer)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BHSE,
            v_BHSE,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and bias is None,
        )
        return self.o_proj(y_BHTE.transpose(1, 2).reshape(batch, steps, -1))

    # -- in a block -----------------------------------------------------------------------------

    def inputs(self, tokens: Pass) -> Inputs:
        """The boolean bias, and cos and sin of the rotary angles; None where there is none."""
        bias = tokens.once(("attention bias", self.causal), lambda: self._bias(tokens))
        if not self.rotary:
            return bias, None, None
        size, theta = self.head_size, self.rope_theta
        angles = tokens.once(
            ("rotary", size, theta), lambda: rotary_angles(tokens.positions(), size, theta)
        )
        return bias, *angles

    def _bias(self, tokens: Pass) -> Tensor | None:
        if not self.causal:
            mask = tokens.new_mask()
            return None if mask is None else padding_bias(mask)
        mask = tokens.whole_mask()
        return None if mask is None else attention_bias(mask, tokens.steps)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        """cache: a transformers Cache."""
        bias, cos, sin = inputs
        rotary = None if cos is None or sin is None else (cos, sin)
        return self(x, bias, rotary, cache)
