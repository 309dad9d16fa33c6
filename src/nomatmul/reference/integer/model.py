"""The forward pass of a MatMul-free LM in integers: what the accelerator computes, bit for bit.

Legend: B sequences, T tokens, D hidden size, V vocabulary; `...` any leading shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.integer import bounds
from nomatmul.reference.integer.folds import Constants, Fold, Fractions, Gated, Network
from nomatmul.reference.integer.numerics import Formats, Int
from nomatmul.reference.integer.reading import network_of
from nomatmul.reference.integer.run import Run
from nomatmul.reference.integer.scalar import Scalar
from nomatmul.reference.integer.trace import Trace

# A layer's state: h int64 [B, D]. Arrays are replaced, never changed.
State = list[Int]


class IntegerModel:
    """A packed MatMul-free LM (MLGRU with GLU or ternary trees) in fixed point.

    formats: widths. network: its folds. bounds: what `bounds.prove` found. fractions: those that it
    leaves, or smaller ones. constants: {name of a fold: Constants}. embedding_scale: a Scalar [V]
    of the rows of network.embedding.
    Raises ValueError for widths in which something could overflow (it names the layer and the width
    that would do), and for fractions that are larger than a bound leaves.
    """

    def __init__(
        self,
        config: ModelConfig,
        network: Network,
        formats: Formats,
        fractions: Fractions | None = None,
    ) -> None:
        self.config, self.network, self.formats = config, network, formats
        proved, self.bounds = bounds.prove(network, formats)
        self.fractions = proved if fractions is None else fractions.checked(proved)
        self.embedding_scale = Scalar.of(network.embedding_scale)
        self.constants: dict[str, Constants] = {}
        fractions, kept = self.fractions, formats.vector_fraction
        for number, layer in enumerate(network.layers):
            self._prepare(layer.mixer.enter, fractions.residual)
            self._prepare(layer.mixer.leave, fractions.mixer[number], kept)
            if layer.channel is not None:
                self._prepare(layer.channel.enter, fractions.residual)
                self._prepare(layer.channel.leave, fractions.channel[number])
        self._prepare(network.head, fractions.residual)

    def _prepare(self, fold: Fold, fraction: int, gate_fraction: int = 0) -> None:
        self.constants[fold.name] = fold.constants(fraction, gate_fraction)

    @classmethod
    def from_packed(cls, reader: PackedReader, formats: Formats | None = None) -> IntegerModel:
        """Build from a packed directory; an embedding of floats is rounded to int8 rows.

        Raises ValueError for a part that the accelerator lacks, and for widths in which something
        could overflow (it names the layer and the width that would do).
        """
        formats = formats or Formats()
        return cls(reader.config, network_of(reader, formats), formats)

    @property
    def logits_scale(self) -> float:
        """The value of a unit of the logits."""
        return 2.0**-self.fractions.logits

    def new_state(self, batch: int = 1) -> State:
        """The empty memory of `batch` sequences."""
        sizes = [layer.mixer.leave.inputs for layer in self.network.layers]
        return [np.zeros((batch, size), np.int64) for size in sizes]

    def step(self, token: int, state: State, trace: Trace | None = None) -> NDArray[np.int32]:
        """The logits int32 [V] behind one more token of one sequence; `state` is brought up to date
        in place, and `trace` is told what every step left. Raises ValueError for a token outside
        the vocabulary."""
        logits_BTV, new = self.forward([[token]], state, trace)
        state[:] = new
        logits_V: NDArray[np.int32] = logits_BTV[0, 0]
        return logits_V

    def forward(
        self, input_ids: ArrayLike, state: State | None = None, trace: Trace | None = None
    ) -> tuple[NDArray[np.int32], State]:
        """(logits int32 [B, T, V], new state) of ids [B, T] behind a state; trace: of one token.

        Raises ValueError for an id outside the vocabulary or an input that is not [B, T].
        """
        ids_BT = self._checked(input_ids)
        state = self.new_state(len(ids_BT)) if state is None else state
        assert all(len(h_BD) == len(ids_BT) for h_BD in state)
        run = Run(self.constants, self.fractions, self.formats, trace)
        scale_BT = Scalar(self.embedding_scale.m[ids_BT], self.embedding_scale.e[ids_BT])
        x_BTD = run.embedded(self.network.embedding[ids_BT], scale_BT)
        new = []
        for number, layer in enumerate(self.network.layers):
            x_BTD, h_BD = run.mixed(x_BTD, state[number], layer.mixer, number)
            new.append(h_BD)
            if isinstance(layer.channel, Gated):
                x_BTD = run.gated(x_BTD, layer.channel, number)
            elif layer.channel is not None:
                x_BTD = run.forest(x_BTD, layer.channel)
        return run.logits(x_BTD, self.network.head).astype(np.int32), new

    def logprobs(self, logits: NDArray[np.int32]) -> NDArray[np.float64]:
        """float64 [..., V]: natural logarithms of the probabilities that logits stand for."""
        real = logits * self.logits_scale
        real -= real.max(axis=-1, keepdims=True)
        result: NDArray[np.float64] = real - np.log(np.exp(real).sum(axis=-1, keepdims=True))
        return result

    def score(self, input_ids: ArrayLike, chunk: int = 64) -> NDArray[np.float64]:
        """float64 [B, T - 1]: log p(ids[t] | ids[:t]) of ids [B, T], `chunk` tokens at once."""
        ids_BT = self._checked(input_ids)
        state, found = self.new_state(len(ids_BT)), []
        for first in range(0, ids_BT.shape[1] - 1, chunk):
            part_BT = ids_BT[:, first : first + chunk + 1]
            logits_BTV, state = self.forward(part_BT[:, :-1], state)
            next_BT1 = part_BT[:, 1:, None]
            found.append(np.take_along_axis(self.logprobs(logits_BTV), next_BT1, -1)[..., 0])
        return np.concatenate(found, axis=1) if found else np.zeros((len(ids_BT), 0))

    def _checked(self, input_ids: ArrayLike) -> Int:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be integers [B, T], got {ids.dtype} {ids.shape}")
        low, high, size = int(ids.min()), int(ids.max()), len(self.network.embedding)
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is out of range; the vocabulary is 0..{size - 1}")
        return ids.astype(np.int64)
