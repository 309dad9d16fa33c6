"""Where a seed stands: saved every minute and when it is stopped, so that it goes on as if never.

OUT/TASK/seed-N-checkpoint holds model and optimiser as checkpoints of training do
(`train.checkpoints`), the random states, and position.json. It is removed when the seed has ended.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nomatmul.finetune.results import check_settings
from nomatmul.formats.files.directory import new_directory, write_json
from nomatmul.train.checkpoints import CheckpointError, restore, save_optimizer
from nomatmul.train.model import write_model
from nomatmul.train.ranks import Ranks
from nomatmul.train.signals import Stopped
from nomatmul.train.states import save_random_states

_EVERY = 60.0  # seconds between checkpoints


@dataclasses.dataclass
class Position:
    """The next batch of a seed, and what the ones before have given.

    total: sum of the epoch's losses so far, a loss a row. seconds: of training so far.
    """

    epoch: int = 0
    batch: int = 0
    total: float = 0.0
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


class SeedCheckpoint:
    """The checkpoint of one seed. described: what it belongs to; stop: number of a signal, or 0."""

    def __init__(
        self,
        directory: Path,
        described: dict[str, Any],
        tokenizer: Any,
        stop: Callable[[], int] = lambda: 0,
    ) -> None:
        self.directory, self.described, self.tokenizer = directory, described, tokenizer
        self.stop = stop
        self._saved_at = time.monotonic()

    def read(self, model: Any, optimizer: torch.optim.Optimizer) -> Position:
        """Put the saved state into model and optimiser; where to go on.

        Raises ValueError for a damaged checkpoint or one of other settings.
        """
        file = self.directory / "position.json"
        if not self.directory.exists():
            return Position()
        try:
            values = json.loads(file.read_text("utf-8"))
            settings = values.pop("settings")
            position = Position(**values)
            check_settings(file, settings, self.described)
            restore(self.directory, model, optimizer)
        except (
            OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, CheckpointError
        ) as error:  # fmt: skip
            raise ValueError(
                f"{self.directory} is damaged ({error}): remove it to train this seed from its "
                "start"
            ) from None
        return position

    def after_step(
        self, model: Any, optimizer: torch.optim.Optimizer, position: Callable[[], Position]
    ) -> None:
        """Save if it is time, or a signal has come: then raises `Stopped` behind it."""
        number = self.stop()
        if not number and time.monotonic() - self._saved_at < _EVERY:
            return
        with new_directory(self.directory) as temporary:
            write_model(model, self.tokenizer, temporary)
            save_optimizer(model, optimizer, temporary)
            save_random_states(temporary, Ranks.alone())
            where = {"settings": self.described, **dataclasses.asdict(position())}
            write_json(temporary / "position.json", where)
        self._saved_at = time.monotonic()
        if number:
            raise Stopped(number)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
