"""The memory of a sequence: named pieces, layer by layer, in whatever memory a backend works in.

The table of parts (formats/architecture.py) says which pieces a layer leaves: pieces of one size
(MLGRU's h) and pieces that grow by a row a position (keys and values).

Legend: L layers, S floats of a layer's pieces of one size (the most of any layer), P positions.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import Architecture, Piece

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """The pieces of every layer by name: ({"mixer.h": Piece}, ...)."""

    layers: tuple[dict[str, Piece], ...]

    @staticmethod
    def of(model: Architecture) -> Layout:
        """The pieces that the mixers of a model leave behind."""
        layers: list[dict[str, Piece]] = []
        for block in model.blocks:
            parts = {"mixer": block.mixer, "channel": block.channel}
            pieces = [(at, piece) for at, part in parts.items() if part for piece in part.state()]
            layers.append({f"{at}.{piece.name}": piece for at, piece in pieces})
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

    def gathered(self, arrays: Mapping[str, Float]) -> Float:
        """New float32 [L, S] that holds the pieces of one size."""
        fixed_LS = np.zeros(self.fixed_shape, np.float32)
        for name, view in self.views(fixed_LS).items():
            view[...] = arrays[name]
        return fixed_LS


class State(ABC):
    """What one sequence has left behind. A backend's `step` advances content and position, both or
    neither."""

    def __init__(self, layout: Layout, position: int = 0) -> None:
        assert not layout.grows, "no backend keeps growing pieces yet: capability.check"
        self.layout = layout
        self.position = position

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.layout.nbytes(self.position)

    @abstractmethod
    def fork(self) -> State:
        """An independent copy."""

    @abstractmethod
    def arrays(self) -> dict[str, Float]:
        """Every piece by name on the host, copied."""

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
    """A state in main memory; `fixed_LS` is what a kernel advances in place."""

    def __init__(self, layout: Layout, fixed_LS: Float | None = None, position: int = 0) -> None:
        super().__init__(layout, position)
        self.fixed_LS = np.zeros(layout.fixed_shape, np.float32) if fixed_LS is None else fixed_LS

    def fork(self) -> HostState:
        return HostState(self.layout, self.fixed_LS.copy(), self.position)

    def arrays(self) -> dict[str, Float]:
        return self.layout.views(self.fixed_LS.copy())
