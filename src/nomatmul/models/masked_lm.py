"""The masked language model: an encoder whose head guesses hidden tokens (BERT, UltraFastBERT).

Shape suffixes: B sequences, T steps, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.models.encoder import EncoderBase
from nomatmul.models.hf.arguments import refuse_unknown
from nomatmul.models.layers import linear_of
from nomatmul.models.losses import check_labels, share_of_batch
from nomatmul.ops.loss import IGNORE_INDEX


class MaskedLM(EncoderBase):
    """BERT, UltraFastBERT and what lies between: an encoder with a tied head without bias.

    In training only the tokens that are to be guessed go through the head.
    """

    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 (transformers' form)

    def _build_head(self, model: ModelConfig) -> None:
        self.head = linear_of(architecture_of(model).head)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chunk: int = 0,
        predicted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats, z) of the labels [B, T] that are not -100.

        The trainer's path: no logits are kept. chunk: see `chunked_cross_entropy`. predicted: the
        number of such labels in the batch, if it is known beforehand (fewer are fine): then
        nothing has a size that depends on values, as graphs and torch.compile want it, and the
        loss is NaN if there are more. Raises ValueError for labels out of range.
        """
        self._check_labels(input_ids, labels)
        hidden = self.hidden(input_ids, attention_mask)
        return self._loss_of_labels(hidden, labels, chunk, predicted)

    def _loss_of_labels(
        self, hidden: Tensor, labels: Tensor, chunk: int, predicted: int | None
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, labels_N = hidden.flatten(0, 1), labels.flatten()
        counted_N = labels_N != IGNORE_INDEX
        if predicted is None:
            if not torch.compiler.is_compiling():
                index = counted_N.nonzero().squeeze(-1)
                if not len(index):
                    index = counted_N.new_zeros(1, dtype=torch.long)
                hidden_ND, labels_N = hidden_ND[index], labels_N[index]
            return self.loss_of_hidden(hidden_ND, labels_N, chunk=chunk)
        if predicted < 1:
            raise ValueError(f"predicted must be at least 1, got {predicted}")
        index = counted_N.byte().argsort(descending=True, stable=True)[:predicted]
        loss, z = self.loss_of_hidden(hidden_ND[index], labels_N[index], chunk=chunk)
        too_many = counted_N.sum() > predicted
        return torch.where(too_many, math.nan, loss), z

    def _check_labels(self, like: Tensor, labels: Tensor) -> None:
        if labels.shape != like.shape[:2]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected {tuple(like.shape[:2])}"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
        size = self.config.vocab_size
        what = f"the vocabulary has {size}, and {IGNORE_INDEX} marks tokens not to be guessed"
        check_labels(labels, size, self.training, what)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V] at each position, and the loss if labels are given.

        input_ids: integers [B, T]; attention_mask: [B, T], 0 for padding; labels: [B, T], -100
        where nothing is to be guessed. In training mode with labels the logits are not returned.
        num_items_in_batch: what the sum of the losses is divided by, None for the number of
        labels. Token types, if given, mean nothing. Returns MaskedLMOutput, or its tuple when
        return_dict is False. Raises ValueError for an argument that is unknown.
        """
        refuse_unknown("MaskedLM.forward", kwargs)
        collect = self._collector(output_hidden_states)
        hidden = self.hidden(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, collect=collect
        )
        loss = logits = None
        if labels is not None:
            self._check_labels(hidden, labels)
            loss, _ = self._loss_of_labels(hidden, labels, 0, None)
            loss = share_of_batch(loss, labels, num_items_in_batch)
        if labels is None or not self.training:
            logits = self.head(hidden)
        return self._answer(MaskedLMOutput(loss=loss, logits=logits), collect, return_dict)
