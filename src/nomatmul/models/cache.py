"""What a sequence leaves behind: the recurrent state of an MLGRU model.

Shape suffixes: B sequences, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RecurrentCache:
    """One float32 state [B, D] a layer; its size does not grow with the sequence.

    Speaks the part of transformers' cache protocol that `generate` and beam search use.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[Tensor | None] = [None] * num_layers
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions (padding included) that went into the state."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a recurrent state has no longest sequence."""
        return -1

    def fork(self) -> RecurrentCache:
        """An independent copy."""
        copy = RecurrentCache(len(self.states))
        copy.states = [None if s is None else s.clone() for s in self.states]
        copy.seen = self.seen
        return copy

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r the state of sequence beam_idx[r] (beam search)."""
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named."""
        self._map(lambda s: s[indices.to(s.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda s: s.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state cannot be rolled back; fork() it beforehand."""
        raise ValueError(
            f"cannot remove {tokens_to_remove} tokens from a recurrent state: fork it before"
        )

    def _map(self, change: object) -> None:
        assert callable(change)
        self.states = [None if s is None else change(s) for s in self.states]

    @property
    def nbytes(self) -> int:
        """Bytes held by the states."""
        return sum(s.numel() * s.element_size() for s in self.states if isinstance(s, torch.Tensor))
