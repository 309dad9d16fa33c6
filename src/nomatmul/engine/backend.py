"""What computes: the protocol of a backend, and the backends by name.

A backend is one model in memory: "native" (the C++ core), "numpy" (the oracle) or "cuda" (a GPU).
Which models it runs is answered by formats/capability.py, before it is made.

Legend: S sequences, T tokens, N tokens of all sequences, D hidden size, V vocabulary, A trees of a
layer, L levels of a tree.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.state import Float, Layout, Pieces, State

if TYPE_CHECKING:
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed.layout import Forms
    from nomatmul.formats.packed.reader import PackedReader

Want = Literal["last", "all", "none", "hidden"]
Ids = NDArray[np.int32]
Layer = Callable[[Float], Float]
Paths = dict[int, NDArray[np.int32]]


class Gpu(Protocol):
    """The device that a backend computes on, where that is not the CPU."""

    def name(self) -> str:
        """Its own name."""

    def peak_bytes(self) -> int:
        """The most device memory that this process had in use."""

    def copy_bandwidth(self) -> float:
        """Bytes a second that a large copy moves, read and written together."""


class Backend(Protocol):
    """One model that can be computed; safe to call from several threads."""

    name: str
    isa: str
    threads: int
    gpu: Gpu | None

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights in memory by part ("embedding", "core", "head", "norms", ...).

        Raises ValueError for a backend that holds no packed weights.
        """

    def unvisited_bytes(self) -> int:
        """Of the weights, the rows of trees that one token does not visit."""

    def scratch_bytes(self) -> int:
        """Bytes of work space of the largest step so far."""


class CausalBackend(Backend, Protocol):
    """A decoder: sequences are fed token by token, or many at a time."""

    layout: Layout

    def new_state(self) -> State:
        """The state of a sequence that has seen nothing."""

    def load_state(self, arrays: Pieces, position: int) -> State:
        """The state that holds these pieces (see Layout.shapes)."""

    def step(self, states: Sequence[Any], ids_T: Sequence[Ids], want: Want) -> Float:
        """Advance each state, made by this backend, by its ids; float32 [S, V] ("last"),
        [sum of T, V] ("all"), [0, V] ("none") or the final-normed hidden state behind each
        sequence's last id [S, D] ("hidden").

        Raises ValueError for an id out of range or values not finite, and changes no state then.
        """

    def with_threads(self, threads: int) -> CausalBackend:
        """The same weights, not copied, computed by another number of threads.

        Raises ValueError for a backend that has no threads to choose.
        """


class EncoderBackend(Backend, Protocol):
    """An encoder without its task head: sequences are computed whole, side by side."""

    def hidden(
        self,
        ids_N: Ids,
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

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor as the packed file has it (bfloat16 as uint16 bits), for task heads."""

    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        """A function from x [N, K] to x W^T [N, M]; weight [M, K] as stored, scale [M] of int8."""


@dataclass(frozen=True)
class Options:
    """How a model is to be opened; arguments of `nomatmul.load`."""

    threads: int | None = None
    isa: str | None = None
    mmap: bool = False
    verify: bool = True
    device: str = "cpu"
    kv: str = "f16"
    private: bool = False


class Opener(Protocol):
    """What the module of a backend offers. Both raise ValueError for an option that is not for this
    backend or cannot be had here, and FormatError for damaged weights."""

    def open_packed(self, reader: PackedReader, options: Options) -> Any:
        """The model of a packed directory: a CausalBackend or, of an encoder, an EncoderBackend."""

    def open_random(
        self, config: ModelConfig, forms: Forms, seed: int, options: Options
    ) -> CausalBackend:
        """A decoder of random weights."""


# In order of preference on a CPU. A module is imported when its backend is asked for.
_MODULES = {
    "native": "nomatmul.engine.backends.native",
    "numpy": "nomatmul.engine.backends.numpy",
    "cuda": "nomatmul.engine.backends.cuda.opening",
}


def opener(name: str) -> Opener:
    """The module of a backend."""
    return cast("Opener", importlib.import_module(_MODULES[name]))
