"""The task heads of an encoder, over the hidden states that a backend computes.

Legend: N tokens of all sequences, T tokens of one, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.encoder import head_shapes
from nomatmul.reference.activations import ACTIVATIONS
from nomatmul.reference.linear import expanded

if TYPE_CHECKING:
    from nomatmul.engine.backend import Layer
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.encoder import EncoderReading


class TaskHead:
    """The head that an encoder was trained with. Raises FormatError for damaged tensors.

    tensor gives one by its name, and linear the layer of a matrix: those of a backend, or of a
    float checkpoint (`Checkpoint.read`, `reference.linear.stored_linear`).
    """

    def __init__(
        self,
        tensor: Callable[[str], NDArray[Any]],
        linear: Callable[[NDArray[Any], Float | None], Layer],
        config: ModelConfig,
        reading: EncoderReading,
    ) -> None:
        self._tensor, self._linear, self._reading = tensor, linear, reading
        linears = head_shapes(config.hidden_size, reading)
        self._vocabulary: Layer | None = None
        if reading.task == "masked" and not config.tie_embeddings:
            self._vocabulary = self._matrix("head")
        self._classifier = self._affine("classifier") if linears else None
        self._pooler = self._affine("pooler") if "pooler" in linears else None

    def logits(self, x_ND: Float) -> Float:
        """[N, V] or [N, C] of hidden states or, for a sequence's class, of pooled ones."""
        if self._classifier is None:
            return self._vocabulary_logits(x_ND)
        x = x_ND if self._pooler is None else self._pooler(x_ND)
        if self._reading.task == "sequence":
            x = ACTIVATIONS[self._reading.head.pooler_activation](x)
        return self._classifier(x)

    def _vocabulary_logits(self, hidden_ND: Float) -> Float:
        if self._vocabulary is None:
            table = self._tensor("embedding.weight")
            if table.dtype == np.int8:
                scale = self._tensor("embedding.scale")
                self._vocabulary = self._linear(table, scale)
            else:
                # by the BLAS, which reads the table as it lies
                transposed = expanded(table).T
                self._vocabulary = lambda x: x @ transposed
        return self._vocabulary(hidden_ND)

    def _matrix(self, name: str) -> Layer:
        weight = self._tensor(f"{name}.weight")
        scale = self._tensor(f"{name}.scale") if weight.dtype == np.int8 else None
        return self._linear(weight, scale)

    def _affine(self, name: str) -> Layer:
        matrix, bias = self._matrix(name), self._tensor(f"{name}.bias")
        return lambda x: matrix(x) + bias


def pooled(
    hidden_TD: Float, seen_T: NDArray[np.bool_], reading: EncoderReading, how: str | None = None
) -> Float:
    """[D] of one sequence's hidden states, as the classifier's head says, or by `how`.

    Tokens that are not seen count only where the head pools over padding.
    """
    head = reading.head
    how = head.pooler if how is None else how
    result: Float = hidden_TD[0]
    if how == "zero_index":
        return result
    kept = hidden_TD if head.pool_padding else hidden_TD[seen_T]
    if how == "avg":
        result = kept.mean(axis=0)
        return result
    top: Float = kept.max(axis=0)
    result = top if how == "max" else top + np.log(np.exp(kept - top).sum(axis=0))
    return result
