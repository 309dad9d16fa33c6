"""What a comparison will cost: memory before it starts, time before and while it runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nomatmul.evaluate.compare_cell import Trainee
from nomatmul.evaluate.compare_plan import Cell, missing, variant_config
from nomatmul.evaluate.compare_variants import Variant
from nomatmul.evaluate.rows import read_rows
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.memory import FORCE, OutOfMemoryError, estimate, free_memory, gib, too_little
from nomatmul.train.metrics import Console, duration
from nomatmul.train.plan import plan_device
from nomatmul.train.tokens import open_stream

if TYPE_CHECKING:
    from nomatmul.evaluate.compare import CompareOptions

_STEPS = 2  # that are timed of each variant
_START = 5.0  # seconds until a process trains


def check_memory(
    options: CompareOptions, variants: Sequence[Variant], devices: Sequence[str]
) -> None:
    """Raises OutOfMemoryError naming the first variant that a device surely cannot hold."""
    config = options.config
    base = dataclasses.replace(
        config, batch_ramp=0.0, micro_batch_size=config.batch_size, loss_chunks=1
    )
    plan = plan_device(torch.device(devices[0]), base.precision)
    host = plan.memory == "host"
    free = free_memory(plan, devices.count("cpu"))
    if free is None:
        return
    for variant in variants:
        need = estimate(variant_config(base, variant), 1, "none", plan.kernels, host)
        if too_little(need, free):
            raise OutOfMemoryError(
                f"too little memory for {variant.name}: about {need.text()} are needed, "
                f"{gib(free)} are free; a smaller batch_size or sequence_length needs less "
                f"({FORCE})"
            )


def run_costs(cells: Sequence[Cell], threads: int) -> dict[str, float]:
    """Seconds of one run of each cell's variant, from two steps of it in this process, on a CPU."""
    if not cells:
        return {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        held = sum(len(open_stream(path)) for path in cells[0].valid.values())
        return {cell.variant: _seconds(cell, held) for cell in cells}
    finally:
        torch.set_num_threads(before)


def _seconds(cell: Cell, held: int) -> float:
    config = dataclasses.replace(cell.train_config, steps=_STEPS, warmup_steps=0)
    with ternary_cache() as cache:
        trainee = Trainee(dataclasses.replace(cell, eval_points=0), cache, lambda text: None)
        trainee.train(config)
        began = time.monotonic()
        scored = config.tokens_per_step
        trainee.score(scored)
        scoring = (time.monotonic() - began) / scored
    looks = min(cell.eval_tokens, held) + cell.eval_points * min(cell.eval_tokens // 4, held)
    tokens = cell.config["steps"] * config.tokens_per_step
    return tokens / max(trainee.speed, 1e-9) + looks * scoring


def sum_of(cells: Sequence[Cell], costs: dict[str, float]) -> float:
    """Seconds of all runs of these cells together."""
    return sum(_START + len(cell.seeds) * costs[cell.variant] for cell in cells)


def about(seconds: float) -> str:
    """A time in words that claim no more than an estimate can."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} seconds"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


class TotalBar:
    """How far all runs together are: those that have ended, by what each costs."""

    def __init__(
        self, console: Console, cells: Sequence[Cell], costs: dict[str, float], rows: Path
    ) -> None:
        self.console, self.cells, self.rows = console, cells, rows
        self.costs = costs or {cell.variant: 1.0 for cell in cells}
        self.estimated = sum_of(cells, costs) if costs else 0.0
        self.total = self._cost(cells)
        self.runs = sum(len(cell.seeds) for cell in cells)
        self.began = time.monotonic()
        self._shown = self.began

    def _cost(self, cells: Sequence[Cell]) -> float:
        return sum(len(cell.seeds) * self.costs[cell.variant] for cell in cells)

    def tick(self) -> None:
        if time.monotonic() - self._shown < 1.0:
            return
        self._shown = time.monotonic()
        todo = missing(read_rows(self.rows), self.cells)
        share = 1 - self._cost(todo) / self.total
        passed = self._shown - self.began
        expected = passed / share if share > 0 else self.estimated
        done = self.runs - sum(len(cell.seeds) for cell in todo)
        left = f", {duration(max(expected - passed, 0.0))} left" if expected else ""
        # Between the ends of two runs the clock tells, but never more than they will.
        moved = min(passed / expected, share + 1 / self.runs) if expected else share
        self.console.progress(max(share, moved), f"{done} of {self.runs} runs{left}")
