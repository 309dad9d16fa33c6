"""Encoders that classify whole sequences or every token (GLUE, tagging).

Shape suffixes: B sequences, T steps, D hidden, C labels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from nomatmul.formats.config import ModelConfig
from nomatmul.models.encoder import EncoderBase
from nomatmul.models.hf.arguments import refuse_unknown
from nomatmul.models.losses import check_labels, share_of_batch
from nomatmul.ops.activations import activate
from nomatmul.ops.loss import IGNORE_INDEX


class _Classifier(EncoderBase):
    """What both classifiers share; a checkpoint of the masked model gives them a fresh head."""

    _pools = False
    new_tensors = ("pooler.", "classifier.")
    spare_tensors = ("head.",)

    def _build_head(self, model: ModelConfig) -> None:
        head, size = self.config.head, model.hidden_size
        self.pooler: nn.Linear | None = None
        if self._pools and head.pooler_size is not None:
            self.pooler = nn.Linear(size, head.pooler_size)
            size = head.pooler_size
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}, it must be at least 1")
        self.classifier = nn.Linear(size, self.num_labels)
        self.set_dropout(head.hidden_dropout)

    @property
    def num_labels(self) -> int:
        """Labels that the classifier knows; two where the config says nothing."""
        return int(self.config.num_labels or 0)

    def _classify(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.config.classifier_dropout, self.training)
        return self.classifier(x)

    def _check_classes(self, labels: Tensor) -> None:
        what = f"the model has {self.num_labels} labels"
        check_labels(labels, self.num_labels, self.training, what)


class EncoderForSequenceClassification(_Classifier):
    """One answer a sequence: pooled hidden states, a dense layer, tanh, and the classifier.

    One label is a regression (mean squared error); several with whole-number labels are classes
    (cross-entropy), with float labels [B, C] independent yes-or-no questions. `config.problem_type`
    decides where it is set.
    """

    _pools = True

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
        """Logits [B, C], and the loss if labels are given: [B], or [B, C] for several questions.

        num_items_in_batch: what the sum of the losses is divided by, None for the number of labels.
        Returns SequenceClassifierOutput, or its tuple when return_dict is False. Raises ValueError
        for labels out of range and for an argument that is unknown.
        """
        refuse_unknown("EncoderForSequenceClassification.forward", kwargs)
        collect = self._collector(output_hidden_states)
        hidden = self.hidden(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, collect=collect
        )
        x = self.pool(hidden, attention_mask)
        if self.pooler is not None:
            x = self.pooler(x)
        logits = self._classify(activate(x, self.config.pooler_activation))
        loss = None
        if labels is not None:
            loss = self._loss(logits.float(), labels)
            loss = share_of_batch(loss, labels, num_items_in_batch)
        return self._answer(
            SequenceClassifierOutput(loss=loss, logits=logits), collect, return_dict
        )

    def _loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        kind: str | None = self.config.problem_type
        if kind is None:
            whole = not labels.is_floating_point()
            several = "single_label_classification" if whole else "multi_label_classification"
            kind = "regression" if self.num_labels == 1 else several
        if kind != "single_label_classification" and labels.numel() != logits_BC.numel():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected {tuple(logits_BC.shape)}"
            )
        if kind == "regression":
            return F.mse_loss(
                logits_BC.squeeze(-1), labels.float().reshape(logits_BC.squeeze(-1).shape)
            )
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(
                logits_BC, labels.float().reshape(logits_BC.shape)
            )
        if labels.numel() != len(logits_BC):
            raise ValueError(f"{labels.numel()} labels do not fit {len(logits_BC)} sequences")
        self._check_classes(labels)
        return F.cross_entropy(logits_BC, labels.reshape(-1).long())


class EncoderForTokenClassification(_Classifier):
    """One answer a token: the classifier on every hidden state."""

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
        """Logits [B, T, C], and the mean loss of the labels [B, T] that are not -100.

        num_items_in_batch: what the sum of the losses is divided by, None for the number of labels.
        Returns TokenClassifierOutput, or its tuple when return_dict is False. Raises ValueError for
        labels out of range and for an argument that is unknown.
        """
        refuse_unknown("EncoderForTokenClassification.forward", kwargs)
        collect = self._collector(output_hidden_states)
        hidden = self.hidden(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, collect=collect
        )
        logits, loss = self._classify(hidden), None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])}"
                )
            self._check_classes(labels)
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=IGNORE_INDEX)
            loss = share_of_batch(loss, labels, num_items_in_batch)
        return self._answer(TokenClassifierOutput(loss=loss, logits=logits), collect, return_dict)
