"""Encoders: embedding with positions, blocks that look both ways, final norm; no head yet.

Shape suffixes: B sequences, T steps, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.models.base import TextModel
from nomatmul.models.block import Block
from nomatmul.models.channels.trees import TreeLayer
from nomatmul.models.hf.arguments import refuse_unknown
from nomatmul.models.hf.config import EncoderConfig
from nomatmul.models.layers import RMSNorm
from nomatmul.models.mixer import Pass, TokenMixer


def sinusoids(steps: int, size: int, device: torch.device | None = None) -> Tensor:
    """float32 [steps, size]: sin(t * f_i) in even elements 2i, cos(t * f_i) in odd ones 2i + 1.

    f_i = exp(-2i ln(10000) / size), all in float32 (arXiv 1706.03762, as crammed BERT has it).
    """
    step = -math.log(10000.0) / size
    frequency = torch.exp(torch.arange(0, size, 2, device=device).float() * step)
    angle = torch.arange(steps, device=device).float().unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(steps, size)


def check_encoder(config: ModelConfig) -> None:
    """Raises ValueError for dials of which no encoder is built."""
    if config.causal:
        raise ValueError("an encoder needs causal=False; this config describes a decoder")
    if any(block.mixer.state() for block in architecture_of(config).blocks):
        raise ValueError(
            f"token_mixer {config.token_mixer!r} sees one direction only: an encoder needs "
            "'attention'"
        )


class EncoderBase(TextModel):
    """What all encoders share: everything but what reads the hidden states.

    Tensor names are those of nomatmul's training checkpoints. `from_pretrained` reads own
    directories and published `crammedBERT` ones. Initial weights follow the authors' code: after
    its layers have drawn their own, a last pass makes every matrix normal with
    `initializer_range`, biases zero, norms one and the padding token's embedding zero; that
    includes the trees of an `fff`.
    """

    config_class = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        model = config.model_config
        check_encoder(model)
        parts = self._build_body(model)
        self.position_scale: nn.Parameter | None = None
        if parts.sinusoidal:
            self.position_scale = nn.Parameter(torch.full((1,), model.hidden_size**-0.5))
        self.dropout = 0.0
        self._build_head(model)
        self.post_init()

    def _build_head(self, model: ModelConfig) -> None:
        """Modules of the subclass, made before weights are drawn."""

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
            # transformers draws anew only what was not loaded, and marks the rest so
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if self.config.pad_token_id is not None and not loaded:
                module.weight[self.config.pad_token_id].zero_()
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TreeLayer):
            module.initial_std = std
            module.reset_parameters()
        elif isinstance(module, EncoderBase) and module.position_scale is not None:
            nn.init.constant_(module.position_scale, module.model_config.hidden_size**-0.5)

    def set_dropout(self, share: float) -> None:
        """Dropout in training of embeddings, attention weights and both sublayers' outputs.

        0 (masked pre-training, as the authors') unless a classification model sets its
        `hidden_dropout`. Raises ValueError outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueError(f"dropout {share!r} must lie in [0, 1)")
        self.dropout = share
        for module in self.modules():
            if isinstance(module, Block | TokenMixer):
                module.dropout = share

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Final-normed hidden states [B, T, D].

        attention_mask: [B, T], 0 for padding, anywhere in a row; nobody looks there. Padding takes
        its position all the same. inputs_embeds: [B, T, D] in place of the tokens' embeddings
        (positions are still added). collect, a list, receives the input of every block and the
        result. Raises ValueError for ids out of range, a sequence that is empty or longer than
        `max_position_embeddings`, or a wrong mask.
        """
        x = self._embed(input_ids, inputs_embeds)
        steps = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        tokens = Pass(x, attention_mask, position_ids=steps)
        return self._through_blocks(x, tokens, collect=collect)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x = self._token_embeddings(input_ids, inputs_embeds)
        steps = x.shape[1]
        if steps > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {steps} tokens is longer than max_position_embeddings "
                f"{self.config.max_position_embeddings}"
            )
        if self.position_scale is not None:
            table_TD = sinusoids(steps, x.shape[-1], x.device)
            x = x + (self.position_scale * table_TD).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual_dtype or torch.get_autocast_dtype(x.device.type))
        return F.dropout(x, self.dropout, self.training)

    def pool(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, D] of hidden states, as the config's `pooler` says (see `EncoderHead`)."""
        head = self.config.head
        if head.pooler == "zero_index":
            return hidden_BTD[:, 0]
        if attention_mask is None or head.pool_padding:
            if head.pooler == "avg":
                return hidden_BTD.mean(1)
            return hidden_BTD.amax(1) if head.pooler == "max" else hidden_BTD.logsumexp(1)
        keep_BT1 = attention_mask.bool().unsqueeze(-1)
        if head.pooler == "avg":
            kept = torch.where(keep_BT1, hidden_BTD, 0.0).sum(1)
            return kept / keep_BT1.sum(1).clamp(min=1).to(kept.dtype)
        lowest = torch.finfo(hidden_BTD.dtype).min
        kept = torch.where(keep_BT1, hidden_BTD, lowest)
        return kept.amax(1) if head.pooler == "max" else kept.logsumexp(1)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Sentence embeddings [B, D]: the pooled hidden states, without the head's layers."""
        return self.pool(self.hidden(input_ids, attention_mask), attention_mask)


class Encoder(EncoderBase):
    """The encoder by itself, for hidden states and sentence embeddings (`embed`)."""

    spare_tensors = ("head.", "pooler.", "classifier.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states, in transformers' BaseModelOutput. Token types, if given, mean nothing.

        Raises ValueError for an argument that is unknown.
        """
        refuse_unknown("Encoder.forward", kwargs)
        collect = self._collector(output_hidden_states)
        x = self.hidden(input_ids, attention_mask, inputs_embeds=inputs_embeds, collect=collect)
        return self._answer(BaseModelOutput(last_hidden_state=x), collect, return_dict)
