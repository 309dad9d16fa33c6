"""The C++ core: one graph for decoders and encoders, on threads and an instruction set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.graph import describe, rearranged
from nomatmul.engine.native import default_threads, native
from nomatmul.engine.state import Float, HostState, Layout, PagedState, Pieces
from nomatmul.engine.weights import (
    HEADS,
    Weights,
    in_threads,
    largest_first,
    map_weights,
    read_one_by_one,
    read_weights,
)
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.packed.forms import is_table
from nomatmul.formats.packed.layout import Forms

if TYPE_CHECKING:
    from nomatmul.engine.backend import Ids, Layer, Options, Paths, Want
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed.reader import PackedReader


_LARGE = 32 << 20  # bytes of an embedding that is worth leaving in the file


def open_packed(reader: PackedReader, options: Options) -> NativeBackend:
    count = _checked(options)
    if not reader.config.causal:
        weights = read_one_by_one(reader)
    elif options.mmap:
        weights = map_weights(reader, verify=options.verify, threads=count)
    else:
        names = set(rearranged(describe(reader.config, reader.forms)))
        rows = {"embedding.weight"} if _looked_up(reader) and not options.private else set()
        weights = read_weights(
            reader, verify=options.verify, threads=count, rearranged=names, mapped=rows
        )
    return NativeBackend(
        reader.config, reader.forms, weights, threads=count, isa=options.isa, kv=options.kv
    )


def _looked_up(reader: PackedReader) -> bool:
    """Is the embedding large, in floats, and of no use but for a row a token?"""
    info = reader.infos.get("embedding.weight")
    table = is_table(architecture_of(reader.config), reader.forms)
    return info is not None and info.dtype != "I8" and not table and info.nbytes >= _LARGE


def open_random(config: ModelConfig, forms: Forms, seed: int, options: Options) -> NativeBackend:
    from nomatmul.engine.random_weights import random_weights

    weights = random_weights(config, forms, seed, set(rearranged(describe(config, forms))))
    return NativeBackend(
        config, forms, weights, threads=options.threads, isa=options.isa, kv=options.kv
    )


def _checked(options: Options) -> int:
    """The number of threads. Raises ValueError for an instruction set that is not there."""
    isas = native().kernels.isas()
    if options.isa is not None and options.isa not in isas:
        raise ValueError(f"isa {options.isa!r} is not available here; available: {', '.join(isas)}")
    return options.threads if options.threads is not None else default_threads()


class NativeBackend:
    """A CausalBackend of a causal model, an EncoderBackend of another one.

    An encoder's token has the same bits whatever the other tokens and the threads are: that is why
    the core's dense products are its own. A BLAS sums in an order that depends on the batch, and a
    last bit may turn a decision of a tree. docs/log has their speeds.

    chunk: tokens that go through the layers together. kv: how keys and values are kept, one of
    KV_FORMS. Raises ValueError for an instruction set
    that is not there.
    """

    name = "native"
    gpu = None

    def __init__(
        self,
        config: ModelConfig,
        forms: Forms,
        weights: Weights,
        *,
        threads: int | None = None,
        isa: str | None = None,
        chunk: int = 256,
        kv: str = "f16",
    ) -> None:
        self.config, self.forms, self.weights = config, forms, weights
        self.architecture = architecture_of(config)
        self.layout = Layout.of(self.architecture, kv)
        count = default_threads() if threads is None else threads
        self.model: Any = native().Model(describe(config, forms, chunk=chunk, kv=kv), isa, count)
        self._fill()
        self.isa: str = self.model.isa
        self.threads: int = self.model.threads

    def _fill(self) -> None:
        """Hand the graph its tensors; the core reads them in place where it can, and re-arranges
        others in several threads."""
        arrays = self.weights.arrays
        if self.config.causal:
            names = largest_first({name: self.weights.sizes[name] for name in arrays})
            in_threads(lambda name: self.model.set(name, arrays[name]), names, self.model.threads)
            self.model.check_complete()
            return
        for name in arrays:
            if not name.startswith(HEADS):
                array = self.weights.arrays[name]
                if name == "embedding.weight":
                    self._embedding = array
                if name == "position_scale":
                    name, array = "positions", array * self._positions()
                self.model.set(name, array)
        self.model.check_complete()

    def _positions(self) -> Float:
        from nomatmul.reference.ops import sinusoidal

        return sinusoidal(self.config.max_position_embeddings, self.config.hidden_size)

    def new_state(self) -> HostState | PagedState:
        if self.layout.grows:
            return PagedState(self.layout, self.model.pages())
        return HostState(self.layout)

    def load_state(self, arrays: Pieces, position: int) -> HostState | PagedState:
        if self.layout.grows:
            return PagedState.of(self.layout, self.model.pages(), arrays, position)
        return HostState(self.layout, self.layout.gathered(arrays), position)

    def step(
        self,
        states: Sequence[HostState | PagedState],
        ids_T: Sequence[Ids],
        want: Want,
        *,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        """As CausalBackend has it; seconds: a dict to which those of each part are added."""
        pages = [state.pages for state in states if isinstance(state, PagedState)]
        fixed = [state.fixed_LS for state in states]
        result: Float
        result, parts = self.model.step(fixed, pages, list(ids_T), want, seconds is not None)
        for state, ids in zip(states, ids_T, strict=True):
            state.position += len(ids)
        _add(seconds, parts)
        return result

    def hidden(
        self,
        ids_N: Ids,
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Float:
        hidden_ND: Float
        hidden_ND, rows, parts = self.model.encode(
            ids_N, offsets_B, seen_N, paths is not None, seconds is not None
        )
        if paths is not None:
            for name, trees in self.architecture.trees().items():
                layer = int(name.split(".")[1])
                paths[layer] = rows[layer].reshape(len(ids_N), trees.trees, trees.depth + 1)
        _add(seconds, parts)
        return hidden_ND

    def tensor(self, name: str) -> NDArray[Any]:
        return self._embedding if name == "embedding.weight" else self.weights.arrays[name]

    def linear(self, weight: NDArray[Any], scale: Float | None) -> Layer:
        layer: Layer = native().Linear(weight, scale, self.threads, self.isa)
        return layer

    def weight_bytes(self) -> dict[str, int]:
        return self.weights.bytes_by_part()

    def unvisited_bytes(self) -> int:
        sizes, total = self.weights.sizes, 0
        for name, trees in self.architecture.trees().items():
            row = sizes[f"{name}.rows.packed"] // trees.rows
            total += row * (trees.rows - trees.active_rows)
        return total

    def scratch_bytes(self) -> int:
        return int(self.model.scratch_bytes)

    def with_threads(self, threads: int) -> NativeBackend:
        other = copy.copy(self)  # the graph, its panels, too, is one for both
        other.model = self.model.with_threads(threads)
        other.threads = other.model.threads
        return other


def _add(seconds: dict[str, float] | None, parts: dict[str, float]) -> None:
    """Add the seconds of each part to those that are there."""
    if seconds is not None:
        seconds |= {part: seconds.get(part, 0.0) + spent for part, spent in parts.items()}
