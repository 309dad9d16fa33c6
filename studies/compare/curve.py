"""The curve of a cell's run: its losses by the clock, and whether it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nomatmul.train.config import TrainConfig
from nomatmul.train.loop import Clock
from studies.compare.plan import Cell

_GIVE_UP = 0.5  # a run is cut if it cannot end in time even at twice its speed

Log = Callable[[str], None]


class Curve:
    """Losses of a run by its clock, which evaluations do not count in, and its status."""

    def __init__(self, cell: Cell, config: TrainConfig) -> None:
        self.cell, self.config = cell, config
        self.clock = Clock()
        self.losses: list[Tensor] = []
        self.curve: list[list[float]] = []  # step, training loss since the last look, seconds
        self.held: list[list[float]] = []  # step, held-out loss, seconds
        self.status, self.step, self.shown = "ok", 0, 0.0
        self.took = 0.0  # seconds, once it has ended

    def ended(self) -> float:
        """Stop the clock; tokens a second."""
        self.took = self.clock.working()
        return self.step * self.config.tokens_per_step / max(self.took, 1e-9)

    def due(self, step: int) -> bool:
        """Is it time for a look at the held-out text? Points lie evenly, the last at the end."""
        points, steps = self.cell.eval_points, self.config.steps
        return points > 0 and step * points // steps > (step - 1) * points // steps

    def held_out(self, step: int, evaluate: Callable[[], float]) -> None:
        """Add the held-out loss; the clock stands still meanwhile."""
        seconds = round(self.clock.working(), 2)
        with self.clock.paused():
            self.held.append([step, round(evaluate(), 5), seconds])

    def look(self, step: int, log: Log) -> None:
        """The one wait for the device: is the loss a number, is there time to end?"""
        mean = float(torch.stack(self.losses).mean())
        self.losses.clear()
        self.step = step
        self.curve.append([step, round(mean, 4), round(self.clock.working(), 2)])
        if not math.isfinite(mean):
            self.status = "diverged"
        elif step < self.config.steps and self._too_late(step):
            self.status = "cut"
        if time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            speed = step * self.config.tokens_per_step / max(self.clock.working(), 1e-9)
            log(
                f"seed {self.config.seed}: step {step} of {self.config.steps}, loss {mean:.3f}, "
                f"{speed:,.0f} tokens/s"
            )

    def _too_late(self, done: int) -> bool:
        rest = self.clock.working() / done * (self.config.steps - done)
        deadline = self.cell.deadline
        return deadline > 0 and time.time() + _GIVE_UP * rest > deadline
