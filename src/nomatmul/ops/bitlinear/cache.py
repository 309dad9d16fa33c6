"""Ternary weights kept from one forward pass to the next while the latent weights stand still.

Shape suffixes: G matrices of one launch, M outputs, K inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.bitlinear import steps

_slots = itertools.count()
_active: TernaryCache | None = None


def new_slot() -> int:
    """A number under which one layer's ternary weights are kept."""
    return next(_slots)


class TernaryCache:
    """Holds the ternary form of every layer used while it is open: one byte a weight.

    Of a layer in full precision, its weights in the type of the products.

    with ternary_cache() as cache:
        for batch in batches:
            loss(batch).backward()      # ternarised once, used by all passes of one step
            optimizer.step()
            cache.clear()

    An entry serves as long as its weights lie at the same address in the same version, so a
    change in place is seen without `clear`. What changes behind torch's back (weights gathered
    again by FSDP, `.data`) is not: call `clear` after every optimizer step.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple, Tensor, Tensor]] = {}
        self._outer: TernaryCache | None = None

    def __enter__(self) -> TernaryCache:
        global _active
        self._outer, _active = _active, self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _active
        _active = self._outer
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next forward pass ternarises anew."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, slot: int, weights: Sequence[Tensor], unrounded: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `ternary_weights`."""
        key = (unrounded, *((w.data_ptr(), w._version, w.dtype) for w in weights))
        entry = self._entries.get(slot)
        if entry is None or entry[0] != key:
            entry = (key, *_make(weights, unrounded))
            self._entries[slot] = entry
        return entry[1], entry[2]


def ternary_cache() -> TernaryCache:
    """A cache that works while it is open as a context manager."""
    return TernaryCache()


def _make(weights: Sequence[Tensor], unrounded: torch.dtype | None) -> tuple[Tensor, Tensor]:
    if unrounded is not None:
        return steps.unrounded(unrounded, *weights)
    return choose.run("ternarize", "nomatmul.ops.bitlinear.triton", steps, weights[0], *weights[1:])


@torch.no_grad()
def ternary_weights(
    slot: int, weights: Sequence[Tensor], unrounded: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """t int8 [G, M, K] and w_scale float32 [G] of G weights [M, K]; from the open cache if there.

    unrounded: not ternary but as they are, in this type, with scales of one. slot: from `new_slot`,
    one for this group of weights. Callers must not change the result.
    """
    # A compiled model ternarises in its graph: entries and versions of weights, which change with
    # every step, would be facts to compile it for anew.
    if _active is None or torch.compiler.is_compiling():
        return _make(weights, unrounded)
    return _active.get(slot, weights, unrounded)
