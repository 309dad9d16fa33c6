"""How one run of a comparison goes: its clock, its losses, and whether it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nomatmul.train.config import TrainConfig
from studies.compare.plan import Cell

_GIVE_UP = 0.5  # a run is cut if it cannot end in time even at twice its speed

Say = Callable[[str], None]


class Course:
    """How a run goes: its clock without the looks aside, losses, status."""

    def __init__(self, cell: Cell, config: TrainConfig) -> None:
        self.cell, self.config = cell, config
        self.began, self.aside = time.monotonic(), 0.0
        self.losses: list[Tensor] = []
        self.curve: list[list[float]] = []  # step, training loss since the last look, seconds
        self.held: list[list[float]] = []  # step, held-out loss, seconds
        self.status, self.step, self.shown = "ok", 0, 0.0
        self.took = 0.0  # seconds, once it has ended

    def seconds(self) -> float:
        return time.monotonic() - self.began - self.aside

    def ended(self) -> float:
        """Stop the clock; tokens a second."""
        self.took = self.seconds()
        return self.step * self.config.tokens_per_step / max(self.took, 1e-9)

    def due(self, step: int) -> bool:
        """Is it time for a look at the held-out text? Points lie evenly, the last at the end."""
        points, steps = self.cell.eval_points, self.config.steps
        return points > 0 and step * points // steps > (step - 1) * points // steps

    def held_out(self, step: int, loss: float, began: float) -> None:
        self.held.append([step, round(loss, 5), round(began - self.began - self.aside, 2)])
        self.aside += time.monotonic() - began

    def look(self, step: int, say: Say) -> None:
        """The one wait for the device: is the loss a number, is there time to end?"""
        mean = float(torch.stack(self.losses).mean())
        self.losses.clear()
        self.step = step
        self.curve.append([step, round(mean, 4), round(self.seconds(), 2)])
        if not math.isfinite(mean):
            self.status = "diverged"
        elif step < self.config.steps and self._too_late(step):
            self.status = "cut"
        if time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            speed = step * self.config.tokens_per_step / max(self.seconds(), 1e-9)
            say(
                f"seed {self.config.seed}: step {step} of {self.config.steps}, loss {mean:.3f}, "
                f"{speed:,.0f} tokens/s"
            )

    def _too_late(self, done: int) -> bool:
        rest = self.seconds() / done * (self.config.steps - done)
        deadline = self.cell.deadline
        return deadline > 0 and time.time() + _GIVE_UP * rest > deadline
