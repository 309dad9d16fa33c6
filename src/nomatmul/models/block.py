"""One block: x += token_mixer(norm(x)); x += channel_mixer(norm(x)).

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nomatmul.formats.config import ModelConfig
from nomatmul.models.attention import Attention
from nomatmul.models.layers import FFN, GLU, RMSNorm
from nomatmul.models.mlgru import MLGRU


def make_token_mixer(config: ModelConfig, layer: int) -> MLGRU | Attention:
    """The token mixer that the dials name."""
    if config.token_mixer == "mlgru":
        return MLGRU(
            config.hidden_size,
            linear=config.linear,
            eps=config.linear_norm_eps,
            gate_norm_eps=config.gate_norm_eps,
        )
    return Attention(
        config.hidden_size,
        config.num_heads,
        linear=config.linear,
        eps=config.linear_norm_eps,
        rope_theta=config.rope_theta,
        layer=layer,
    )


def make_channel_mixer(config: ModelConfig) -> GLU | FFN | None:
    """The channel mixer that the dials name, None for "none".

    Raises ValueError for "fff", which this version does not train.
    """
    if config.channel_mixer == "none":
        return None
    if config.channel_mixer == "fff":
        raise ValueError(
            "channel_mixer 'fff' is not supported by the torch model of this version; "
            "use 'glu', 'ffn' or 'none'"
        )
    kind = GLU if config.channel_mixer == "glu" else FFN
    return kind(
        config.hidden_size, config.mlp_size, linear=config.linear, eps=config.linear_norm_eps
    )


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = make_token_mixer(config, layer)
        self.channel = make_channel_mixer(config)
        if self.channel is not None:
            self.channel_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        lower_bound: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """x: [B, T, D] -> [B, T, D].

        attention_mask: [B, T] for MLGRU, the boolean of `attention_bias` for attention; cache:
        a RecurrentCache or a transformers Cache, changed in place.
        """
        y = self.mixer_norm(x)
        if isinstance(self.mixer, MLGRU):
            state = cache.states[self.layer] if cache is not None else None
            mixed, last = self.mixer.step(y, attention_mask, lower_bound, state)
            if cache is not None:
                cache.states[self.layer] = last
        else:
            mixed = self.mixer(y, attention_mask, rotary, cache)
        x = x + mixed
        if self.channel is not None:
            x = x + self.channel(self.channel_norm(x))
        return x
