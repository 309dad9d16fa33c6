"""The memory of a sequence: named pieces, layer by layer, in whatever memory a backend works in.

The table of parts (formats/architecture.py) says which pieces a layer leaves: pieces of one size
(MLGRU's h) and pieces that grow by a row a position (keys and values).

Legend: L layers, S floats of a layer's pieces of one size (the most of any layer), P positions, K
key-value heads, E head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import Architecture, Piece

Float = NDArray[np.float32]
Pieces = Mapping[str, NDArray[Any]]

DTYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
# How keys and values are kept: float16, int8 with a float32 scale for a position and head, or
# float32.
KV_FORMS = ("f16", "int8", "f32")


@dataclass(frozen=True)
class Layout:
    """The pieces of every layer by name: ({"mixer.h": Piece}, ...)."""

    layers: tuple[dict[str, Piece], ...]

    @staticmethod
    def of(model: Architecture, kv: str = "f16") -> Layout:
        """The pieces that the mixers of a model leave behind, growing ones in one of KV_FORMS."""
        layers: list[dict[str, Piece]] = []
        for block in model.blocks:
            found: dict[str, Piece] = {}
            for at, part in (("mixer", block.mixer), ("channel", block.channel)):
                for piece in part.state() if part else ():
                    found |= {f"{at}.{one.name}": one for one in _stored(piece, kv)}
            layers.append(found)
        return Layout(tuple(layers))

    @functools.cached_property
    def pieces(self) -> dict[str, Piece]:
        """{"layers.0.mixer.h": Piece} of all layers in their order."""
        return {
            f"layers.{layer}.{name}": piece
            for layer, pieces in enumerate(self.layers)
            for name, piece in pieces.items()
        }

    def shapes(self, position: int) -> dict[str, tuple[int, ...]]:
        """{name: shape} after so many tokens; a growing piece is [P, ...]."""
        return {
            name: (position, *piece.shape) if piece.grows else piece.shape
            for name, piece in self.pieces.items()
        }

    def nbytes(self, position: int) -> int:
        """Bytes of a sequence after so many tokens."""
        pieces = self.pieces.values()
        return sum(piece.nbytes * (position if piece.grows else 1) for piece in pieces)

    @property
    def grows(self) -> bool:
        """Whether a piece grows with the sequence."""
        return any(piece.grows for piece in self.pieces.values())

    @functools.cached_property
    def growing(self) -> dict[str, Piece]:
        """The pieces that grow."""
        return {name: piece for name, piece in self.pieces.items() if piece.grows}

    @property
    def overwritten(self) -> str | None:
        """Name of the first piece that each token overwrites, None where all of them grow."""
        return next((name for name, piece in self.pieces.items() if not piece.grows), None)

    @property
    def fixed_shape(self) -> tuple[int, int]:
        """(L, S): room for the pieces of one size, a row a layer, one piece behind the other."""
        rows = [
            sum(math.prod(piece.shape) for piece in pieces.values() if not piece.grows)
            for pieces in self.layers
        ]
        return len(rows), max(rows, default=0)

    def views(self, fixed_LS: Float) -> dict[str, Float]:
        """The pieces of one size by name, as views of such room."""
        found: dict[str, Float] = {}
        for layer, pieces in enumerate(self.layers):
            at = 0
            for name, piece in pieces.items():
                if not piece.grows:
                    end = at + math.prod(piece.shape)
                    found[f"layers.{layer}.{name}"] = fixed_LS[layer, at:end].reshape(piece.shape)
                    at = end
        return found

    def gathered(self, arrays: Pieces) -> Float:
        """New float32 [L, S] that holds the pieces of one size."""
        fixed_LS = np.zeros(self.fixed_shape, np.float32)
        for name, view in self.views(fixed_LS).items():
            view[...] = arrays[name]
        return fixed_LS


def _stored(piece: Piece, kv: str) -> tuple[Piece, ...]:
    if not piece.grows or kv == piece.dtype:
        return (piece,)
    if kv == "f32":
        return (dataclasses.replace(piece, dtype="f32"),)
    scale = Piece(f"{piece.name}_scale", piece.shape[:1], grows=True)
    return Piece(piece.name, piece.shape, grows=True, dtype="i8"), scale


class State(ABC):
    """What one sequence has left behind. A backend's `step` advances content and position, both or
    neither."""

    def __init__(self, layout: Layout, position: int = 0) -> None:
        self.layout = layout
        self.position = position

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces, those that forks share included."""
        return sum(self.memory().values())

    def memory(self) -> dict[int, int]:
        """{address: bytes} of what it holds in memory; forks share what has the same address."""
        return {id(self): self.layout.nbytes(self.position)}

    @abstractmethod
    def fork(self) -> State:
        """An independent copy."""

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every piece by name on the host, copied: float32 (float16, int8: `Piece.dtype`) of
        `Layout.shapes`."""

    def roll_back(self, position: int) -> None:
        """Forget all tokens behind the first `position` ones.

        Growing pieces end where the position says. Raises ValueError for a position that the
        sequence has not reached, or where a piece of one size has been overwritten since.
        """
        if not 0 <= position <= self.position:
            raise ValueError(
                f"cannot go back to position {position}: the sequence has {self.position} tokens"
            )
        piece = self.layout.overwritten
        if position < self.position and piece is not None:
            raise ValueError(
                f"cannot go back to position {position}: each token overwrites the state"
                f" {piece!r}; fork or save the session at a position to which it may return"
            )
        self.position = position


class HostState(State):
    """A state in main memory; `fixed_LS` is what a kernel advances in place, `grown` holds growing
    pieces [P, ...], whose arrays are replaced and never changed, so that forks share them."""

    def __init__(
        self,
        layout: Layout,
        fixed_LS: Float | None = None,
        position: int = 0,
        grown: Pieces | None = None,
    ) -> None:
        super().__init__(layout, position)
        self.fixed_LS = np.zeros(layout.fixed_shape, np.float32) if fixed_LS is None else fixed_LS
        self.grown = {
            name: np.zeros((0, *piece.shape), DTYPES[piece.dtype]) if grown is None else grown[name]
            for name, piece in layout.growing.items()
        }

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes(self.position)

    def memory(self) -> dict[int, int]:
        # what was rolled back still lies in the whole array
        owners = [array if array.base is None else array.base for array in self.grown.values()]
        return {id(self): self.fixed_LS.nbytes} | {id(one): one.nbytes for one in owners}

    def fork(self) -> HostState:
        return HostState(self.layout, self.fixed_LS.copy(), self.position, self.grown)

    def arrays(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = dict(self.layout.views(self.fixed_LS.copy()))
        found |= {name: array.copy() for name, array in self.grown.items()}
        return {name: found[name] for name in self.layout.pieces}

    def roll_back(self, position: int) -> None:
        super().roll_back(position)
        self.grown = {name: array[: self.position] for name, array in self.grown.items()}


class PagedState(State):
    """A state whose growing pieces lie in the native core's pages (csrc/core/pages.h), which forks
    share until one of them appends."""

    def __init__(self, layout: Layout, pages: Any, fixed_LS: Float | None = None) -> None:
        super().__init__(layout, pages.length)
        self.fixed_LS = np.zeros(layout.fixed_shape, np.float32) if fixed_LS is None else fixed_LS
        self.pages = pages

    @staticmethod
    def of(layout: Layout, pages: Any, arrays: Pieces, position: int) -> PagedState:
        """The state that holds these pieces, in pages that are new."""
        pages.reserve(position)
        for layer, name in enumerate(_keys(layout)):
            for piece in ("k", "v"):
                values = arrays[f"{name}.{piece}"]
                stored = values.view(np.uint16) if values.dtype == np.float16 else values
                pages.load(layer, piece, stored, arrays.get(f"{name}.{piece}_scale"))
        pages.advance(position)
        return PagedState(layout, pages, layout.gathered(arrays))

    @property
    def nbytes(self) -> int:
        # of what never moves: another thread may be feeding the pages
        pages = -(-self.position // self.pages.page_positions)
        return self.fixed_LS.nbytes + int(pages * self.pages.page_bytes)

    def memory(self) -> dict[int, int]:
        size = self.pages.page_bytes
        return {id(self): self.fixed_LS.nbytes} | dict.fromkeys(self.pages.addresses, size)

    def fork(self) -> PagedState:
        return PagedState(self.layout, self.pages.fork(), self.fixed_LS.copy())

    def arrays(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = dict(self.layout.views(self.fixed_LS.copy()))
        for layer, name in enumerate(_keys(self.layout)):
            for piece in ("k", "v"):
                values, scales = self.pages.save(layer, piece)
                found[f"{name}.{piece}"] = (
                    values.view(np.float16) if values.dtype == np.uint16 else values
                )
                if scales is not None:
                    found[f"{name}.{piece}_scale"] = scales
        return {name: found[name] for name in self.layout.pieces}

    def roll_back(self, position: int) -> None:
        super().roll_back(position)
        self.pages.roll_back(self.position)


def _keys(layout: Layout) -> list[str]:
    """Names "layers.0.mixer" of each layer that keeps keys and values."""
    return [name.removesuffix(".k") for name in layout.growing if name.endswith(".k")]
