"""One block: x += token_mixer(norm(x)); x += channel_mixer(norm(x)).

A ternary MLGRU or GLU sublayer that Triton can serve runs as one fused operation
(`nomatmul.ops.fused`); with a cache, a padding mask or hooks on its layers it runs layer by layer.

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nomatmul.formats.config import ModelConfig
from nomatmul.models.channels.fff import FFF
from nomatmul.models.channels.ffn import FFN
from nomatmul.models.channels.glu import GLU
from nomatmul.models.layers import BitLinear, RMSNorm, make_norm
from nomatmul.models.mixers.attention import Attention
from nomatmul.models.mixers.mlgru import MLGRU
from nomatmul.ops import choose, fused

RECOMPUTE = ("none", "mlp", "block")
"""What `CausalLM.set_recompute` takes."""


def fused_wanted(x: Tensor) -> bool:
    """Do the fused sublayers serve x? They are for 16 and 32 bit floats where Triton works."""
    return x.dtype != torch.float64 and choose.triton_wanted(x.device.type)


def watched(module: nn.Module) -> bool:
    """Has someone hooked a layer inside? Fused operations would pass those hooks by."""
    if torch.compiler.is_compiling():
        return False
    return any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
    )


def own_layers(module: nn.Module) -> bool:
    """Are its layers ours? An adapter's wrapper around one computes more than fused operations."""
    return all(isinstance(layer, BitLinear | RMSNorm) for layer in module.children())


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
        causal=config.causal,
        positions=config.positions,
    )


def make_channel_mixer(config: ModelConfig, layer: int) -> GLU | FFN | FFF | None:
    """The channel mixer of this layer that the dials name, None for "none"."""
    kind = config.channel_of(layer)
    size, linear, eps = config.hidden_size, config.linear, config.linear_norm_eps
    if kind == "glu":
        return GLU(size, config.mlp_size, linear=linear, eps=eps, activation=config.glu_activation)
    if kind == "ffn":
        return FFN(size, config.mlp_size, linear=linear, eps=eps, activation=config.activation)
    if kind == "none":
        return None
    assert config.fff_trees is not None
    assert config.fff_depth is not None
    return FFF(
        size,
        trees=config.fff_trees,
        depth=config.fff_depth,
        linear=linear,
        activation=config.activation,
        bias=config.fff_bias,
        master_width=config.fff_master_width,
        eps=eps,
    )


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the residual stream.

    `dropout` is applied in training to what each of them adds.
    """

    dropout: float = 0.0

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mixer_norm = make_norm(config.hidden_size, config.norm, config.norm_eps)
        self.mixer = make_token_mixer(config, layer)
        self.channel = make_channel_mixer(config, layer)
        if self.channel is not None:
            self.channel_norm = make_norm(config.hidden_size, config.norm, config.norm_eps)
        self.recompute = "none"
        ternary = config.linear == "ternary" and config.norm == "rms"
        self._fusable_mixer = ternary and isinstance(self.mixer, MLGRU)
        self._fusable_channel = ternary and isinstance(self.channel, GLU)

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
        plain = attention_mask is None and cache is None and not watched(self)
        dropped = self.training and self.dropout > 0
        fuse = plain and self._fusable_mixer and not dropped and fused_wanted(x)
        fuse = fuse and own_layers(self.mixer)
        saving = self.training and torch.is_grad_enabled() and cache is None
        if saving and self.recompute == "block" and not fuse:
            arguments = (x, attention_mask, lower_bound, rotary)
            return checkpoint(self._mix, *arguments, use_reentrant=False)
        if fuse:
            x = self._fused_mixer(x, lower_bound)
        else:
            x = self._token_mixer(x, attention_mask, lower_bound, rotary, cache)
        if self.channel is None:
            return x
        if fuse and self._fusable_channel and own_layers(self.channel):
            return self._fused_channel(x)
        if saving and self.recompute != "none":
            return checkpoint(self._channel_mixer, x, use_reentrant=False)
        return self._channel_mixer(x)

    def _mix(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        lower_bound: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        x = self._token_mixer(x, attention_mask, lower_bound, rotary, None)
        return x if self.channel is None else self._channel_mixer(x)

    def _token_mixer(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        lower_bound: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Any,
    ) -> Tensor:
        y = self.mixer_norm(x)
        if isinstance(self.mixer, MLGRU):
            state = cache.states[self.layer] if cache is not None else None
            mixed, last = self.mixer.step(y, attention_mask, lower_bound, state)
            if cache is not None:
                cache.states[self.layer] = last
        else:
            mixed = self.mixer(y, attention_mask, rotary, cache)
        return x + F.dropout(mixed, self.dropout, self.training)

    def _channel_mixer(self, x: Tensor) -> Tensor:
        assert self.channel is not None
        return x + F.dropout(self.channel(self.channel_norm(x)), self.dropout, self.training)

    def _fused_mixer(self, x: Tensor, lower_bound: Tensor | None) -> Tensor:
        mixer = self.mixer
        assert isinstance(mixer, MLGRU)
        projections = (mixer.i_proj, mixer.f_proj, mixer.g_proj, mixer.o_proj)
        layers = [layer for layer in projections if isinstance(layer, BitLinear)]
        return fused.mixer(
            x,
            self.mixer_norm.weight,
            [layer.weight for layer in layers],
            [layer.norm.weight for layer in layers],
            mixer.g_norm.weight,
            lower_bound,
            eps=(self.mixer_norm.eps, layers[0].norm.eps, mixer.g_norm.eps),
            slots=(layers[0].slot, layers[3].slot),
            keep=self.recompute != "block" and torch.is_grad_enabled(),
        )

    def _fused_channel(self, x: Tensor) -> Tensor:
        assert isinstance(self.channel, GLU)
        gate, down = self.channel.gate_proj, self.channel.down_proj
        assert isinstance(gate, BitLinear)
        assert isinstance(down, BitLinear)
        return fused.channel(
            x,
            self.channel_norm.weight,
            (gate.weight, down.weight),
            (gate.norm.weight, down.norm.weight),
            eps=(self.channel_norm.eps, gate.norm.eps),
            slots=(gate.slot, down.slot),
            keep=self.recompute == "none" and torch.is_grad_enabled(),
        )
