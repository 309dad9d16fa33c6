"""Training tokens and held-out texts of a cell's runs, the same for all variants.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nomatmul.formats.special_tokens import mask_id
from nomatmul.train.batches import (
    Batches,
    WindowOrder,
    held_out_batches,
    held_out_length,
    held_out_masked,
)
from nomatmul.train.config import TrainConfig
from nomatmul.train.masking import Masking
from nomatmul.train.plan import DevicePlan
from nomatmul.train.tokens import TokenStream, join_streams, open_stream
from studies.compare.plan import Cell


class Texts:
    """Training tokens and held-out texts of a cell, on its device, masked if the model wants it."""

    def __init__(self, cell: Cell, config: TrainConfig, plan: DevicePlan) -> None:
        self.config, self.plan, self.device = config, plan, plan.device
        self.train = join_streams([open_stream(path) for path in cell.train])
        self._cut: dict[tuple[str, int], list[tuple[Tensor, Tensor, int]]] = {}
        self.held = {name: open_stream(path) for name, path in cell.valid.items()}
        self.bytes = {
            name: stream.bytes_of(0, held_out_length(stream, cell.eval_tokens))
            for name, stream in self.held.items()
        }

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_BT, y_BT) without end; the seed draws the order of the windows and the gaps."""
        config = self.config
        order = WindowOrder(len(self.train), config.sequence_length, seed)
        batches = Batches(
            self.train, order, config.batch_size, self.plan, masking=self._masking(seed)
        )
        return batches.run(0)

    def held_out(self, name: str, limit: int) -> list[tuple[Tensor, Tensor, int]]:
        """(x_BT, y_BT, targets that count) of at most `limit` tokens, the same ones every time."""
        if (name, limit) not in self._cut:
            self._cut[name, limit] = list(self._held_out(self.held[name], limit))
        return self._cut[name, limit]

    def _held_out(self, stream: TokenStream, limit: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        length, rows = self.config.sequence_length, self.config.batch_size
        masking = self._masking(0)
        if masking is None:
            return held_out_batches(stream, length, rows, limit, self.device)
        return held_out_masked(stream, length, rows, limit, masking, self.device)

    def _masking(self, seed: int) -> Masking | None:
        """What an encoder is to guess; None for a causal model."""
        model = self.config.model
        if model.causal:
            return None
        return Masking(
            self.config.masked_tokens, mask_id(self.train.tokenizer), model.vocab_size, seed
        )
