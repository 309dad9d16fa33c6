"""A packed encoder on a backend, over sequences laid end to end without padding, and its heads.

Legend: N tokens of all sequences, B sequences, D hidden size, V vocabulary, C classes, A trees,
L levels of a tree.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.graph import GraphForms, describe
from nomatmul.engine.native import native
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.packed.encoder import EncoderReader, pooler_size
from nomatmul.reference.activations import ACTIVATIONS
from nomatmul.reference.linear import expanded, stored_linear
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.ops import sinusoidal

Float = NDArray[np.float32]
Layer = Callable[[Float], Float]
Paths = dict[int, NDArray[np.int32]]

# Tensors that belong to task heads, not to the graph, and those that it gets in another way.
_HEADS = ("head.", "pooler.", "classifier.")
_APART = ("embedding.weight", "position_scale")


class EncoderForward(ABC):
    """A packed encoder and its heads; a subclass computes the states. Raises FormatError for
    damaged tensors."""

    name: str
    embedding: NDArray[Any]  # as stored

    def __init__(self, reader: EncoderReader) -> None:
        self.config, self.forms, self.reading = reader.config, reader.forms, reader.reading
        self._reader = reader
        self.weight_bytes = _weight_bytes(reader)
        self._vocabulary: Layer | None = None
        if self.reading.task == "masked" and not self.config.tie_embeddings:
            self._vocabulary = self._dense("head")
        self._classifier = self._affine("classifier") if self.reading.task != "masked" else None
        self._pooler = self._affine("pooler") if pooler_size(self.reading) else None

    @abstractmethod
    def hidden(
        self,
        ids_N: NDArray[np.int32],
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        """Final-normed hidden states [N, D] of sequences offsets[b]..offsets[b + 1].

        seen: 0 hides a token from all others of its sequence. paths: a dict that receives the
        visited rows int32 [N, A, L] of each layer of trees. seconds: a dict to which those of each
        part are added. Raises ValueError where a value inside the model is not finite.
        """

    @abstractmethod
    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        """A function from x [N, K] to x W^T [N, M]."""

    def vocabulary_logits(self, hidden_ND: Float) -> Float:
        """[N, V] of the masked language model."""
        if self._vocabulary is None:
            if self.embedding.dtype == np.int8:
                scale = self._reader.read("embedding.scale")
                self._vocabulary = self.linear(self.embedding, scale)
            else:
                # by the BLAS, which reads the table as it lies
                transposed = expanded(self.embedding).T
                self._vocabulary = lambda x: x @ transposed
        return self._vocabulary(hidden_ND)

    def classes(self, x: Float) -> Float:
        """[., C] of pooled states (sequence) or hidden states (token)."""
        assert self._classifier is not None
        if self._pooler is not None:
            x = self._pooler(x)
        if self.reading.task == "sequence":
            x = ACTIVATIONS[self.reading.head.pooler_activation](x)
        return self._classifier(x)

    def _dense(self, name: str) -> Layer:
        weight = self._reader.read(f"{name}.weight")
        scale = self._reader.read(f"{name}.scale") if weight.dtype == np.int8 else None
        return self.linear(weight, scale)

    def _affine(self, name: str) -> Layer:
        matrix, bias = self._dense(name), self._reader.read(f"{name}.bias")
        return lambda x: matrix(x) + bias


class NativeEncoder(EncoderForward):
    """The native core's graph. A token has the same bits whatever the other tokens and the threads
    are: that is why its dense products are its own. A BLAS sums in an order that depends on the
    batch, and a last bit may turn a decision of a tree. docs/log has their speeds."""

    def __init__(self, reader: EncoderReader, threads: int, isa: str | None = None) -> None:
        self._core, self._threads, self._isa = native(), threads, isa
        config, forms = reader.config, reader.forms
        graph = describe(config, GraphForms(forms.dense, forms.embedding, forms.rows))
        self._model = self._core.Model(graph, isa, threads)
        self.name = self._model.isa
        self.embedding = reader.read("embedding.weight")
        self._model.set("embedding.weight", self.embedding)
        for name in reader.infos:
            if name not in _APART and not name.startswith(_HEADS):
                self._model.set(name, reader.read(name))
        if config.positions == "sinusoidal":
            table = sinusoidal(config.max_position_embeddings, config.hidden_size)
            self._model.set("positions", reader.read("position_scale") * table)
        self._model.check_complete()
        super().__init__(reader)

    def hidden(
        self,
        ids_N: NDArray[np.int32],
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        hidden_ND: Float
        hidden_ND, rows, parts = self._model.encode(
            ids_N, offsets_B, seen_N, paths is not None, seconds is not None
        )
        shape = (len(ids_N), self.config.fff_trees or 0, (self.config.fff_depth or 0) + 1)
        if paths is not None:
            paths |= {layer: found.reshape(shape) for layer, found in rows.items()}
        if seconds is not None:
            seconds |= {part: seconds.get(part, 0.0) + spent for part, spent in parts.items()}
        return hidden_ND

    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        layer: Layer = self._core.Linear(weight, scale, self._threads, self._isa)
        return layer


class NumpyEncoder(EncoderForward):
    """The oracle: slow, for machines without the native core, and for tests. It times nothing."""

    name = "numpy"

    def __init__(self, reader: EncoderReader) -> None:
        self._model = ReferenceModel.from_packed(reader, head=False)
        self.embedding = reader.read("embedding.weight")
        super().__init__(reader)

    def hidden(
        self,
        ids_N: NDArray[np.int32],
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        found = [
            self._model.forward(ids_N[a:b], None if seen_N is None else seen_N[a:b])
            for a, b in itertools.pairwise(offsets_B)
        ]
        if paths is not None:
            for layer in found[0].paths:
                paths[layer] = np.concatenate([output.paths[layer] for output in found])
        hidden_ND = np.concatenate([output.hidden_BTD[0] for output in found])
        if not np.isfinite(hidden_ND).all():
            raise ValueError("a value inside the model is not finite (NaN or infinity)")
        return hidden_ND

    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        return stored_linear(weight, scale)


def _weight_bytes(reader: EncoderReader) -> dict[str, int]:
    """Bytes in memory by part; dense bfloat16 matrices are widened to float32."""
    found: dict[str, int] = {}
    for name, info in reader.infos.items():
        part = _part_of(name)
        size = info.nbytes
        if part in ("dense", "head") and info.dtype == "BF16":
            size *= 2
        found[part] = found.get(part, 0) + size
    return found


def _part_of(name: str) -> str:
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith(("pooler.", "classifier.")):
        return "head"
    if "norm" in name or name == "position_scale":
        return "norms"
    if name.endswith((".rows", ".row_scale", "channel.bias")):
        return "trees"
    return "dense"


def pooled(
    hidden_TD: Float, seen_T: NDArray[np.bool_], reading: EncoderReading, how: str | None = None
) -> Float:
    """[D] of one sequence's hidden states, as the classifier's head says, or by `how`.

    Tokens that are not seen count only where the head pools over padding.
    """
    head = reading.head
    how = head.pooler if how is None else how
    if how == "zero_index":
        return hidden_TD[0]
    kept = hidden_TD if head.pool_padding else hidden_TD[seen_T]
    if how == "avg":
        return kept.mean(axis=0)
    top = kept.max(axis=0)
    return top if how == "max" else top + np.log(np.exp(kept - top).sum(axis=0))
