"""What computes a step: the native core, or the numpy oracle with the same interface.

Legend: S sequences, T tokens, L layers, D hidden size, V vocabulary. The state of a sequence is
float32 [L, D] in whatever memory the backend works in; `step` advances it in place, and only if
it succeeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.graph import GraphForms, describe
from nomatmul.engine.native import default_threads, native

if TYPE_CHECKING:
    from nomatmul.engine.weights import Weights
    from nomatmul.formats.config import ModelConfig

Want = Literal["last", "all", "none"]
Float = NDArray[np.float32]
Ids = NDArray[np.int32]


class Backend(Protocol):
    """One model that can be stepped; safe to call from several threads."""

    name: str
    isa: str
    threads: int

    def new_state(self) -> Any:
        """The state of a sequence that has seen nothing."""

    def copy_state(self, state: Any) -> Any:
        """An independent copy of a state."""

    def state_to_numpy(self, state: Any) -> Float:
        """A state as float32 [L, D] on the host, not copied where it lies there."""

    def state_from_numpy(self, state_LD: Float) -> Any:
        """The state of a backend from float32 [L, D]."""

    def step(self, states: Sequence[Any], ids_T: Sequence[Ids], want: Want) -> Float:
        """Advance each state by its ids; float32 [S, V] ("last"), [sum of T, V] ("all") or
        [0, V] ("none"). Raises ValueError for an id out of range or values not finite."""


class _HostStates:
    """States that are plain numpy arrays [L, D]."""

    shape: tuple[int, int]

    def new_state(self) -> Float:
        """See Backend."""
        return np.zeros(self.shape, np.float32)

    def copy_state(self, state: Float) -> Float:
        """See Backend."""
        return state.copy()

    def state_to_numpy(self, state: Float) -> Float:
        """See Backend."""
        return state

    def state_from_numpy(self, state_LD: Float) -> Float:
        """See Backend."""
        return state_LD


class NativeBackend(_HostStates):
    """The C++ core over Weights. Raises ValueError for an instruction set that is not there."""

    name = "native"

    def __init__(
        self,
        config: ModelConfig,
        packing: str,
        embedding: str,
        weights: Weights,
        *,
        threads: int | None = None,
        isa: str | None = None,
        chunk: int = 256,
    ) -> None:
        core = native()
        if threads is None:
            threads = default_threads()
        self.weights = weights
        self.shape = (config.num_layers, config.hidden_size)
        description = describe(config, GraphForms(packing, embedding), chunk=chunk)
        self.model: Any = core.Model(description, isa, threads)
        for name, array in weights.arrays.items():
            self.model.set(name, array)
        self.model.check_complete()
        self.isa: str = self.model.isa
        self.threads: int = self.model.threads

    def step(self, states: Sequence[Float], ids_T: Sequence[Ids], want: Want) -> Float:
        """See Backend."""
        return self.model.step(list(states), list(ids_T), want)


class NumpyBackend(_HostStates):
    """The oracle of `nomatmul.reference` behind the engine's sessions: slow, and correct."""

    name = "numpy"
    isa = "numpy"
    threads = 1

    def __init__(self, reader: Any) -> None:
        from nomatmul.reference.model import ReferenceModel

        self.model = ReferenceModel.from_packed(reader)
        self.shape = (reader.config.num_layers, reader.config.hidden_size)

    def step(self, states: Sequence[Float], ids_T: Sequence[Ids], want: Want) -> Float:
        """See Backend."""
        from nomatmul.reference.model import State

        rows, new_states = [], []
        for state_LD, ids in zip(states, ids_T, strict=True):
            state = State([{"h": h_D[None]} for h_D in state_LD], np.zeros((1, 0), bool))
            output = self.model.forward(ids[None], state=state)
            logits_TV = output.logits_BTV[0]
            if not np.isfinite(logits_TV).all():
                raise ValueError("the activations are not finite (NaN or infinity)")
            if want != "none":
                rows.append(logits_TV if want == "all" else logits_TV[-1:])
            new_states.append(output.state)
        for state_LD, new in zip(states, new_states, strict=True):
            for layer, pieces in enumerate(new.layers):
                state_LD[layer] = pieces["h"][0]
        if not rows:
            return np.zeros((0, self.model.config.vocab_size), np.float32)
        return np.concatenate(rows)
