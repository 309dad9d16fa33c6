"""The oracle of `nomatmul.reference` behind the engine's models: slow, and correct."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.state import DTYPES, Float, HostState, Layout
from nomatmul.engine.state import Pieces as StatePieces
from nomatmul.engine.weights import bytes_by_part, encoder_sizes
from nomatmul.formats.architecture import architecture_of
from nomatmul.reference.linear import stored_linear
from nomatmul.reference.mixers import Pieces
from nomatmul.reference.model import ReferenceModel, State

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Ids, Layer, Options, Paths, Want
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed.layout import Forms
    from nomatmul.formats.packed.reader import PackedReader


def open_packed(reader: PackedReader, options: Options) -> NumpyBackend:
    if options.isa is not None:
        raise ValueError(f'backend "numpy" has no instruction sets, got isa {options.isa!r}')
    if options.kv == "int8":
        raise ValueError(f'backend "numpy" keeps keys and values as floats, got kv {options.kv!r}')
    return NumpyBackend(reader, options.threads or 1, options.kv)


def open_random(config: ModelConfig, forms: Forms, seed: int, options: Options) -> CausalBackend:
    raise ValueError('backend "numpy" runs packed models only, none of random weights')


class NumpyBackend:
    """A CausalBackend of a causal model, an EncoderBackend of another one; it times nothing.

    threads: those of the BLAS, for encoders. kv: how keys and values are kept, "f16" or "f32".
    """

    name = "numpy"
    isa = "numpy"
    gpu = None

    def __init__(self, reader: PackedReader, threads: int = 1, kv: str = "f16") -> None:
        self._reader, self._causal = reader, reader.config.causal
        self.layout = Layout.of(architecture_of(reader.config), kv)
        self.threads = 1 if self._causal else threads
        self.model = ReferenceModel.from_packed(reader, head=self._causal, kv=kv)

    def new_state(self) -> HostState:
        return HostState(self.layout)

    def load_state(self, arrays: StatePieces, position: int) -> HostState:
        return HostState(self.layout, self.layout.gathered(arrays), position, arrays)

    def step(self, states: Sequence[HostState], ids_T: Sequence[Ids], want: Want) -> Float:
        outputs = []
        for state, ids in zip(states, ids_T, strict=True):
            outputs.append(self.model.forward(ids[None], state=self._before(state)))
            if not np.isfinite(outputs[-1].logits_BTV).all():
                raise ValueError("the activations are not finite (NaN or infinity)")
        for state, ids, output in zip(states, ids_T, outputs, strict=True):
            self._keep(state, output.state)
            state.position += len(ids)
        if want == "none":
            return np.zeros((0, self._reader.config.vocab_size), np.float32)
        if want == "hidden":
            return np.concatenate([output.hidden_BTD[0, -1:] for output in outputs])
        first = -1 if want == "last" else 0
        return np.concatenate([output.logits_BTV[0, first:] for output in outputs])

    def _before(self, state: HostState) -> State:
        """A sequence's state as the oracle has it; its pieces know no layer and no room."""
        layers: list[Pieces] = [{} for _ in self.layout.layers]
        for name, array in (self.layout.views(state.fixed_LS) | state.grown).items():
            _, layer, _, piece = name.split(".")
            layers[int(layer)][piece] = array[None].astype(np.float32, copy=False)
        return State(layers, np.ones((1, state.position), bool))

    def _keep(self, state: HostState, new: State) -> None:
        """What the oracle left behind, in the form of the layout."""
        arrays = {}
        for name, piece in self.layout.pieces.items():
            _, layer, _, key = name.split(".")
            arrays[name] = new.layers[int(layer)][key][0].astype(DTYPES[piece.dtype], copy=False)
        state.fixed_LS[:] = self.layout.gathered(arrays)
        state.grown = {name: arrays[name] for name in self.layout.growing}

    def hidden(
        self,
        ids_N: Ids,
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        outputs = [
            self.model.forward(ids_N[a:b], None if seen_N is None else seen_N[a:b])
            for a, b in itertools.pairwise(offsets_B)
        ]
        if paths is not None:
            for layer in outputs[0].paths:
                paths[layer] = np.concatenate([output.paths[layer] for output in outputs])
        hidden_ND = np.concatenate([output.hidden_BTD[0] for output in outputs])
        if not np.isfinite(hidden_ND).all():
            raise ValueError("a value inside the model is not finite (NaN or infinity)")
        return hidden_ND

    def tensor(self, name: str) -> NDArray[Any]:
        return self._reader.read(name)

    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        return stored_linear(weight, scale)

    def weight_bytes(self) -> dict[str, int]:
        if self._causal:
            self._refuse()
        return bytes_by_part(encoder_sizes(self._reader))

    def unvisited_bytes(self) -> int:
        self._refuse()

    def scratch_bytes(self) -> int:
        self._refuse()

    def with_threads(self, threads: int) -> NumpyBackend:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError("the numpy backend holds no packed weights; nothing to measure")
