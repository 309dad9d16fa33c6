"""The runs of a cell whose training changes on its way (`change.py`).

`python -m studies.recipes.trainer` speaks as `studies.compare.cell` does: a cell as JSON
on the first line of input, a second line to go.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomatmul.formats.files.atomic import write_file
from nomatmul.models import CausalLM
from nomatmul.ops import choose
from nomatmul.train.config import TrainConfig
from nomatmul.train.loop import Loop, MicroBatch
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.model import build_model
from studies.compare import cell as compare_cell
from studies.compare.curve import Curve
from studies.recipes.change import Change, ChangedCell
from studies.recipes.chunks import compile_recurrences
from studies.recipes.dead_zone import DeadZone
from studies.recipes.distil import Teacher, distilled_loss
from studies.recipes.recurrences import replace_mixers
from studies.recipes.switches import fused_everywhere, group_scales

PAUSE = 0.5  # seconds between looks for a teacher that is still trained
GRACE = 30.0  # seconds that a process may take to say that it trains one


class ChangedTrainer(compare_cell.CellTrainer):
    """A CellTrainer with phases: full precision, then ternary, perhaps with a teacher."""

    def __init__(self, cell: ChangedCell, *args: Any) -> None:
        self.change: Change = cell.change
        self.models = cell.models
        self.teacher: Teacher | None = None
        if cell.keep:
            self.models.mkdir(exist_ok=True)
            for seed in cell.seeds:
                name = f"{cell.section}-{cell.variant}-{seed}"
                write_file(mark(self.models / name), str(os.getpid()).encode())
        self.places = contextlib.ExitStack()  # what is exchanged for the whole process
        self.phase = contextlib.ExitStack()  # and until the phase ends
        if cell.device == "cpu" and self.change != Change():
            self.places.enter_context(fused_everywhere())
        if self.change.mixer and cell.device != "cpu":
            compile_recurrences()
        super().__init__(cell, *args)

    def _new_model(self) -> Any:
        model = super()._new_model()
        if self.change.mixer:
            replace_mixers(model, self.change.mixer, self.change.every)
        return model

    def _prepare(self, choice: str) -> None:
        """Every kind of step that a run takes: compiled, and replayed graphs compared."""
        super()._prepare(choice)
        for name in self.change.needs:
            wait_for(self.models / name)
        if name := self.change.teacher:
            self.teacher = Teacher(self.models / name, self.plan)
        for dense in (True, False):
            if self.change.dense > 0 if dense else self.teacher is not None or self.change.group:
                self._rehearse(dense)
        fused = not self.change.mixer  # the operations that a change exchanges
        if self.change != Change() and fused and (reason := choose.fallback_reason()):
            raise SystemExit(f"layers that are not fused do not change: {reason}")

    def _rehearse(self, dense: bool) -> None:
        batches = self.texts.batches(0)
        loop = super()._loop(self.config)
        self._begin(dense, loop)
        for _ in range(2):
            loop.take_step(self._taught(batches), 0.0)
        if self.compiled == "graph":
            ((x_BT, y_BT, _),) = self._taught(batches)
            self._check_graph(x_BT, y_BT)
        self.phase.close()
        self.model.set_full_precision(False)
        loop.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _new_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        drawn = build_model(self.config.model)
        if self.change.mixer:
            replace_mixers(drawn, self.change.mixer, self.change.every)
        fresh = drawn.state_dict()
        if name := self.change.start:
            taken = CausalLM.from_pretrained(self.models / name).state_dict()
            fresh |= {k: v for k, v in taken.items() if k in fresh and v.shape == fresh[k].shape}
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(fresh[name])

    def _begin(self, dense: bool, loop: Loop) -> None:
        """A phase: its operations, and a micro-step that is recorded anew."""
        self.phase.close()
        self.model.set_full_precision(dense)
        if self.change.group and not dense:
            self.phase.enter_context(group_scales(self.change.group))
        self.taught = self.teacher is not None and not dense
        loop.optimizer.zero_grad(set_to_none=True)
        self.ternary.clear()
        loss = self.loss
        if self.taught:
            assert self.teacher is not None
            loss = distilled_loss(self.model, self.teacher, self.change.weight)
        plan = dataclasses.replace(self.plan, graph=self.compiled == "graph")
        self.micro = build_micro_step(loss, self.config.z_loss, plan, self.ternary.clear)
        loop.micro_step = self.micro

    def _taught(self, batches: Iterator[tuple[Tensor, Tensor]]) -> list[MicroBatch]:
        """The next batch, which the teacher sees first."""
        x_BT, y_BT = next(batches)
        if self.taught:
            assert self.teacher is not None
            self.teacher.look(x_BT)
        return [(x_BT, y_BT, self.one)]

    def _loop(self, config: TrainConfig) -> Loop:
        """With the change; the last phase stays open, for the scores."""
        self.switch = round(self.change.dense * config.steps)
        self.zeros = DeadZone(self.model)
        loop = super()._loop(config)
        self._begin(self.switch > 0, loop)
        return loop

    def _batch(self, loop: Loop, batches: Iterator[tuple[Tensor, Tensor]]) -> list[MicroBatch]:
        if loop.step == self.switch > 0:
            self._begin(False, loop)
        return self._taught(batches)

    def _evaluate(self, step: int, curve: Curve) -> None:
        super()._evaluate(step, curve)
        if 2 * step >= curve.config.steps:
            self.zeros.look()

    def _row(self, config: TrainConfig, curve: Curve, scores: dict[str, Any]) -> dict[str, Any]:
        row = super()._row(config, curve, scores)
        return {**row, "change": self.change.to_dict(), **self.zeros.row()}


def wait_for(directory: Path) -> None:
    """Until the process that trains this model has written it; ends this one if that has ended."""
    for look in itertools.count():
        if directory.is_dir():
            return
        if look * PAUSE > GRACE and not alive(mark(directory)):
            raise SystemExit(f"{directory} is not there, and no process trains it")
        time.sleep(PAUSE)


def mark(directory: Path) -> Path:
    """Holds the number of the process that trains the model."""
    return directory.with_name(directory.name + ".pid")


def alive(file: Path) -> bool:
    try:
        os.kill(int(file.read_text()), 0)
    except (OSError, ValueError):  # no such file, no such process
        return False
    return True


if __name__ == "__main__":
    compare_cell.main(ChangedCell, ChangedTrainer)
