"""The runs of a cell whose training changes on its way (`change.py`).

`python -m studies.recipes.trainee` speaks as `studies.compare.cell` does: a cell as JSON
on the first line of input, a second line to go.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomatmul.formats.files.atomic import write_file
from nomatmul.models import CausalLM
from nomatmul.ops import choose
from nomatmul.train.config import TrainConfig
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_optimizer, clip_gradients
from nomatmul.train.schedule import learning_rate
from studies.compare import cell as compare_cell
from studies.compare.course import Course
from studies.recipes.change import Change, ChangedCell
from studies.recipes.dead_zone import DeadZone
from studies.recipes.distil import Teacher, distilled_loss
from studies.recipes.muon import Muon
from studies.recipes.structure import add_short_convolutions, hidden_matrices
from studies.recipes.switches import full_precision, fused_everywhere, squared_relu

PAUSE = 0.5  # seconds between looks for a teacher that is still trained
GRACE = 30.0  # seconds that a process may take to say that it trains one


class ChangedTrainee(compare_cell.Trainee):
    """A Trainee with phases: full precision, then ternary, perhaps with a teacher."""

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
        if self.change.structure == "relu2":
            self.places.enter_context(squared_relu())
        super().__init__(cell, *args)

    def _new_model(self) -> Any:
        model = super()._new_model()
        if self.change.structure == "short-convolution":
            add_short_convolutions(model)
        return model

    def _prepare(self, choice: str) -> None:
        """Every kind of step that a run takes: compiled, and replayed graphs compared."""
        super()._prepare(choice)
        for name in self.change.needs:
            wait_for(self.models / name)
        if name := self.change.teacher:
            self.teacher = Teacher(self.models / name, self.plan)
        for dense in (True, False):
            if self.change.dense > 0 if dense else self.teacher is not None:
                self._rehearse(dense)
        if self.change != Change() and (reason := choose.fallback_reason()):
            raise SystemExit(f"layers that are not fused do not change: {reason}")

    def _rehearse(self, dense: bool) -> None:
        optimizer, batches = self._optimizer(self.config), self.texts.batches(0)
        self._begin(dense, optimizer)
        for _ in range(2):
            self._step(*next(batches), optimizer)
        if self.compiled == "graph":
            x_BT, y_BT = next(batches)
            if not dense and self.teacher is not None:
                self.teacher.look(x_BT)
            self._check_graph(x_BT, y_BT)
        self.phase.close()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _new_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = build_model(self.config.model).state_dict()
        if name := self.change.start:
            taken = CausalLM.from_pretrained(self.models / name).state_dict()
            fresh |= {k: v for k, v in taken.items() if k in fresh and v.shape == fresh[k].shape}
        for name, tensor in self.model.state_dict().items():
            if name in fresh:
                tensor.copy_(fresh[name])
            else:  # an added one: it begins as if it were not there
                tensor.zero_()

    def _optimizer(self, config: TrainConfig) -> Any:
        adam = build_optimizer(self.model, config, self.plan)
        if not self.change.muon:
            return adam
        matrices = hidden_matrices(self.model)
        known = {id(matrix) for matrix in matrices}
        for group in adam.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in known]
        rate = config.learning_rate * self.change.muon
        return Both(adam, Muon(matrices, lr=rate, weight_decay=config.weight_decay))

    def _begin(self, dense: bool, optimizer: Any) -> None:
        """A phase: its operations, and a micro-step that is recorded anew."""
        self.phase.close()
        if dense:
            self.phase.enter_context(full_precision())
        self.taught = self.teacher is not None and not dense
        optimizer.zero_grad(set_to_none=True)
        self.ternary.clear()
        loss = self.loss
        if self.taught:
            assert self.teacher is not None
            loss = distilled_loss(self.model, self.teacher, self.change.weight)
        plan = dataclasses.replace(self.plan, graph=self.compiled == "graph")
        self.micro = build_micro_step(loss, self.config.z_loss, plan, self.ternary.clear)

    def _step(self, x_BT: Tensor, y_BT: Tensor, optimizer: Any) -> Tensor:
        if self.taught:
            assert self.teacher is not None
            self.teacher.look(x_BT)
        loss = self.micro(x_BT, y_BT, self.one, True).clone()
        clip_gradients(self.model, self.config.clip_norm)
        optimizer.step()
        self.micro.end(optimizer)
        self.ternary.clear()
        return loss

    def train(self, config: TrainConfig) -> Course:
        """As a Trainee's, with the change; the last phase stays open, for the scores."""
        change, switch = self.change, round(self.change.dense * config.steps)
        self._new_weights(config.seed)
        optimizer, batches = self._optimizer(config), self.texts.batches(config.seed)
        course, self.zeros = Course(self.cell, config), DeadZone(self.model)
        self._begin(switch > 0, optimizer)
        for step in range(config.steps):
            if step == switch > 0:
                if change.fresh:
                    optimizer = self._optimizer(config)
                self._begin(False, optimizer)
            set_rates(optimizer, config, change, step)
            course.losses.append(self._step(*next(batches), optimizer))
            if (step + 1) % compare_cell.LOOK == 0 or step + 1 == config.steps:
                course.look(step + 1, self.say)
            if course.status == "ok" and course.due(step + 1):
                began = time.monotonic()
                course.held_out(step + 1, self.score(self.cell.eval_tokens // 4)["loss"], began)
                if 2 * (step + 1) >= config.steps:
                    self.zeros.look()
            if course.status != "ok":
                break
        self.speed = course.ended()
        return course

    def _row(self, config: TrainConfig, course: Course, scores: dict[str, Any]) -> dict[str, Any]:
        row = super()._row(config, course, scores)
        return {**row, "change": self.change.to_dict(), **self.zeros.row()}


class Both:
    """Two optimisers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none=set_to_none)


def set_rates(optimizer: Any, config: TrainConfig, change: Change, step: int) -> None:
    """Rate and weight decay of a step (from 0)."""
    progress = step / config.steps
    switch = round(change.dense * config.steps)
    if change.rewarm and step >= switch:
        rate = learning_rate(config, step - switch, (step - switch) / (config.steps - switch))
    else:
        rate = learning_rate(config, step, progress)
    if progress >= 0.5:
        rate *= change.second_rate
    for group in optimizer.param_groups:
        group["lr"] = rate * (change.muon if "momentum" in group else 1.0)
        if progress >= change.decay_until:
            group["weight_decay"] = 0.0


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
    compare_cell.main(ChangedCell, ChangedTrainee)
