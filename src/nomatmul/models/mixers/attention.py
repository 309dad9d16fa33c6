"""Self-attention: the token mixer of transformers, causal with rotary positions, and of encoders.

Shape suffixes: B sequences, T new steps, S steps attended to, H heads of queries, J heads of keys
and values, E elements of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.formats.rotary import RopeScaling, frequencies
from nomatmul.models.layers import linear_of, norm_of, shared_rms
from nomatmul.models.mixer import Inputs, Pass, TokenMixer


@torch.compiler.assume_constant_result
def _frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None
) -> tuple[list[float], float]:
    inverse, factor = frequencies(head_size, theta, scaling)
    return inverse.tolist(), factor


@functools.lru_cache(maxsize=64)
def _frequencies_on(
    device: torch.device, head_size: int, theta: float, scaling: RopeScaling | None
) -> Tensor:
    """Kept on the device: copying them would make a GPU wait, and no graph can record it."""
    numbers, _ = _frequencies(head_size, theta, scaling)
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def rotary_angles(
    position_ids_BT: Tensor, head_size: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, T, head_size/2], of the positions (RoPE, arXiv 2104.09864).

    Angles are float64; the factor of a scaling is in both.
    """
    numbers, factor = _frequencies(head_size, theta, scaling)
    if torch.compiler.is_compiling():  # the compiler keeps its own constants
        inverse = torch.tensor(numbers, dtype=torch.float64, device=position_ids_BT.device)
    else:
        inverse = _frequencies_on(position_ids_BT.device, head_size, theta, scaling)
    angle = position_ids_BT.double().unsqueeze(-1) * inverse
    cos, sin = angle.cos().float(), angle.sin().float()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


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


def _multi_head(size: int, heads: int, linear: str, eps: float, causal: bool) -> parts.Attention:
    """Without positions: as many heads of keys and values, together as wide as x."""
    square = parts.Linear(linear, size, size, eps)
    return parts.Attention(
        *(square, square, square, square, None, None),
        heads=heads,
        kv_heads=heads,
        head_size=size // heads,
        causal=causal,
        theta=None,
        scaling=None,
    )


class Attention(TokenMixer):
    """Multi-head attention, no biases; x: [B, T, D] -> [B, T, D].

    causal: each position sees itself and what lies before it; otherwise all positions. positions:
    "rotary" rotates queries and keys; with "sinusoidal" and "none" they stay as they are, for the
    position, if any, is in x. part: a description that says more than the other arguments: fewer
    heads of keys and values, a head size apart, norms of queries and keys in front of the rotation,
    scaled frequencies, other linears. `dropout` is applied in training to the attention's weights.
    Sources: arXiv 1706.03762, section 3.2; fewer heads of keys and values: 2305.13245.

    Raises ValueError for heads that do not divide hidden_size.
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
        part: parts.Attention | None = None,
    ) -> None:
        super().__init__()
        if part is None:
            rotary = positions == "rotary"
            if hidden_size % num_heads or (rotary and (hidden_size // num_heads) % 2):
                even = "even" if rotary else "equal"
                raise ValueError(
                    f"{num_heads} heads do not cut hidden_size {hidden_size} into {even} parts"
                )
            part = _multi_head(hidden_size, num_heads, linear, eps, causal)
            part = dataclasses.replace(part, theta=rope_theta if rotary else None)
        self.layer, self.causal, self.rotary = layer, part.causal, part.theta is not None
        self.num_heads, self.num_kv_heads = part.heads, part.kv_heads
        self.head_size = part.head_size
        self.rope_theta = part.theta or rope_theta
        self.rope_scaling = part.scaling
        self.q_proj = linear_of(part.q_proj)
        self.k_proj = linear_of(part.k_proj)
        self.v_proj = linear_of(part.v_proj)
        self.o_proj = linear_of(part.o_proj)
        self.q_norm = norm_of(part.q_norm) if part.q_norm is not None else None
        self.k_norm = norm_of(part.k_norm) if part.k_norm is not None else None

    @classmethod
    def of(cls, part: parts.Attention, layer: int) -> Attention:
        return cls(part.q_proj.inputs, part.heads, layer=layer, part=part)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """bias: from `attention_bias` or `padding_bias`, None without padding and without a past.

        rotary: from `rotary_angles`, None for positions 0..T-1. cache: a transformers Cache, or
        another with its `update`, that keeps keys and values of this layer, None for none.
        """
        batch, steps, _ = x.shape
        if rotary is None and self.rotary:
            positions = torch.arange(steps, device=x.device).unsqueeze(0)
            rotary = self._angles(positions)
        rms = shared_rms(x, self.q_proj)

        def split(projection: nn.Module, heads: int) -> Tensor:
            return projection(x, rms).view(batch, steps, heads, self.head_size).transpose(1, 2)

        q_BHTE = split(self.q_proj, self.num_heads)
        k_BJSE = split(self.k_proj, self.num_kv_heads)
        v_BJSE = split(self.v_proj, self.num_kv_heads)
        if self.q_norm is not None:
            q_BHTE = self.q_norm(q_BHTE)
        if self.k_norm is not None:
            k_BJSE = self.k_norm(k_BJSE)
        if rotary is not None and self.rotary:
            q_BHTE, k_BJSE = _rotate(q_BHTE, *rotary), _rotate(k_BJSE, *rotary)
        if cache is not None:
            k_BJSE, v_BJSE = cache.update(k_BJSE, v_BJSE, self.layer)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BJSE,
            v_BJSE,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and bias is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(y_BHTE.transpose(1, 2).reshape(batch, steps, -1))

    def _angles(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions_BT, self.head_size, self.rope_theta, self.rope_scaling)

    # -- in a block -----------------------------------------------------------------------------

    def inputs(self, tokens: Pass) -> Inputs:
        """The boolean bias, and cos and sin of the rotary angles; None where there is none."""
        bias = tokens.once(("attention bias", self.causal), lambda: self._bias(tokens))
        if not self.rotary:
            return bias, None, None
        key = "rotary", self.head_size, self.rope_theta, self.rope_scaling
        angles = tokens.once(key, lambda: self._angles(tokens.positions()))
        return bias, *angles

    def _bias(self, tokens: Pass) -> Tensor | None:
        if not self.causal:
            mask = tokens.new_mask()
            return None if mask is None else padding_bias(mask)
        mask = tokens.whole_mask()
        return None if mask is None else attention_bias(mask, tokens.steps)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        """cache: a transformers Cache or a StateCache."""
        bias, cos, sin = inputs
        rotary = None if cos is None or sin is None else (cos, sin)
        return self(x, bias, rotary, cache)
