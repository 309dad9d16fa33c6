"""One block: x += token_mixer(norm(x)); x += channel_mixer(norm(x)).

A sublayer that has a fused form (`nomatmul.ops.fused`) runs as one operation where Triton can
serve; with a cache, a padding mask or hooks on its layers it runs layer by layer.

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nomatmul.formats import architecture as parts
from nomatmul.formats.config import ModelConfig
from nomatmul.models.channels.fff import FFF
from nomatmul.models.channels.ffn import FFN
from nomatmul.models.channels.glu import GLU
from nomatmul.models.layers import LayerNorm, RMSNorm, is_plain, norm_of
from nomatmul.models.mixer import Inputs, Mixer, Pass, TokenMixer
from nomatmul.models.mixers.attention import Attention
from nomatmul.models.mixers.mlgru import MLGRU
from nomatmul.ops import choose

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


TOKEN_MIXERS: dict[type[parts.Part], type[TokenMixer]] = {
    parts.MLGRU: MLGRU,
    parts.Attention: Attention,
}
CHANNEL_MIXERS: dict[type[parts.Part], type[Mixer]] = {
    parts.GLU: GLU,
    parts.FFN: FFN,
    parts.FFF: FFF,
}


def fused_forms(config: ModelConfig) -> tuple[bool, bool]:
    """Have all token mixers of a model a fused form, and all channel mixers? None counts as one."""
    blocks = parts.architecture_of(config).blocks
    mixers = [(TOKEN_MIXERS[type(b.mixer)], b.mixer, b.mixer_norm) for b in blocks]
    channels = [
        (CHANNEL_MIXERS[type(b.channel)], b.channel, b.channel_norm)
        for b in blocks
        if b.channel is not None
    ]
    return all(_has_fused(*each) for each in mixers), all(_has_fused(*each) for each in channels)


def _has_fused(kind: type[Mixer], part: parts.Part, norm: parts.Norm | None) -> bool:
    plain = all(is_plain(linear) for _, linear in parts.linears_of(part))
    return plain and kind.has_fused(part) and norm is not None and norm.kind == "rms"


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the residual stream.

    `dropout` is applied in training to what each of them adds.
    """

    dropout: float = 0.0

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        part = parts.architecture_of(config).blocks[layer]
        self.mixer_norm = norm_of(part.mixer_norm)
        self.mixer = TOKEN_MIXERS[type(part.mixer)].of(part.mixer, layer)
        self.channel: Mixer | None = None
        self.channel_norm: RMSNorm | LayerNorm | None = None
        if part.channel is not None and part.channel_norm is not None:
            self.channel = CHANNEL_MIXERS[type(part.channel)].of(part.channel, layer)
            self.channel_norm = norm_of(part.channel_norm)
        self.recompute = "none"
        self._rms = isinstance(self.mixer_norm, RMSNorm)  # fused forms have no other norm

    def forward(self, x: Tensor, *inputs: Tensor | None, cache: Any = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D].

        inputs: from the mixer's `inputs`, nothing for a whole sequence without padding; cache: a
        StateCache or a transformers Cache, changed in place.
        """
        inputs = inputs or self.mixer.inputs(Pass(x))
        grad = torch.is_grad_enabled()
        plain = cache is None and not watched(self) and not (self.training and self.dropout > 0)
        fuse = plain and self._rms and fused_wanted(x) and self.mixer.fuses(inputs)
        saving = self.training and grad and cache is None
        if fuse:
            keep = self.recompute != "block" and grad
            x = self.mixer.fused(x, self.mixer_norm, inputs, keep=keep)
        elif saving and self.recompute == "block":
            return checkpoint(self._both, x, *inputs, use_reentrant=False)
        else:
            x = self._token_mixer(x, inputs, cache)
        if self.channel is None or self.channel_norm is None:
            return x
        if fuse and self.channel.fuses():
            return self.channel.fused(x, self.channel_norm, keep=self.recompute == "none" and grad)
        if saving and self.recompute != "none":
            return checkpoint(self._channel_mixer, x, use_reentrant=False)
        return self._channel_mixer(x)

    def _both(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        return self._channel_mixer(self._token_mixer(x, inputs, None))

    def _token_mixer(self, x: Tensor, inputs: Inputs, cache: Any) -> Tensor:
        mixed = self.mixer.mix(self.mixer_norm(x), inputs, cache)
        return x + F.dropout(mixed, self.dropout, self.training)

    def _channel_mixer(self, x: Tensor) -> Tensor:
        if self.channel is None or self.channel_norm is None:
            return x
        return x + F.dropout(self.channel(self.channel_norm(x)), self.dropout, self.training)
