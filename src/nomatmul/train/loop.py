"""The training loop: optimiser steps until the end or a request to stop, work between them.

Pretraining, fine-tuning and comparisons run this one. It never waits for the device: what a step
gives stays there until a hook fetches it. A batch is a function of the number of the step and of
the share of the run that is over, so a run that starts at any step goes on as if never stopped.

Shapes: B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nomatmul.ops.bitlinear import TernaryCache
from nomatmul.train.micro_step import MicroStep
from nomatmul.train.optimizer import clip_gradients

MicroBatch = tuple[Tensor, Tensor, Tensor]  # x_BT, targets, what its mean loss counts


@dataclasses.dataclass
class Clock:
    """Seconds in the loop, over all starts of a run, and those of them not spent on steps."""

    before: float = 0.0
    started: float = dataclasses.field(default_factory=time.monotonic)
    aside: float = 0.0

    def restart(self) -> None:
        """This start of the run begins now."""
        self.started, self.aside = time.monotonic(), 0.0

    def elapsed(self) -> float:
        """Seconds in the loop."""
        return self.before + time.monotonic() - self.started

    def working(self) -> float:
        """Seconds spent on steps, of this start and all before."""
        return self.elapsed() - self.aside

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside the block is no work on steps."""
        began = time.monotonic()
        yield
        self.aside += time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step has given, still on the device. loss: over the micro-batches, by their weights.

    norm: of the gradient before clipping; None where nothing is clipped or measured. beside: what
    else the losses gave, by name, weighted alike. inputs: x_BT of the last micro-batch.
    """

    rate: float
    loss: Tensor
    norm: Tensor | None
    beside: dict[str, Tensor]
    inputs: Tensor


@dataclasses.dataclass(frozen=True)
class Hook:
    """Work after the steps for which `due` holds; at_end: also when the run ends with another."""

    due: Callable[[int], bool]
    work: Callable[[StepResult], object]
    at_end: bool = False


def every(interval: int) -> Callable[[int], bool]:
    """Due every so many steps; never for 0."""
    return lambda step: interval > 0 and step % interval == 0


def nobody_looks(x_BT: Tensor) -> None:
    """There is no teacher."""


class Loop:
    """One model's training from step `step` on.

    rate: the learning rate of (step, share of the run that is over). clip_norm: 0 measures the
    gradient only, None not even that. cache: the open ternary cache, made anew after each step.
    look: who sees each micro-batch before the model does.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_step: MicroStep,
        cache: TernaryCache,
        *,
        rate: Callable[[int, float], float],
        clip_norm: float | None = None,
        step: int = 0,
        look: Callable[[Tensor], None] = nobody_looks,
    ) -> None:
        self.model, self.optimizer, self.micro_step = model, optimizer, micro_step
        self.look = look
        self.cache, self.rate, self.clip_norm = cache, rate, clip_norm
        self.step = step

    def run(
        self,
        share: Callable[[], float],
        batch: Callable[[int, float], Sequence[MicroBatch]],
        hooks: Sequence[Hook],
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train until `share` of the run is 1; False: `stop` said so before.

        share: by steps or by a clock. batch: the micro-batches of (step, share). stop: asked after
        each step and its hooks.
        """
        self.model.train()
        result = None
        while (over := share()) < 1:
            result = self.take_step(batch(self.step, over), over)
            for hook in hooks:
                if hook.due(self.step):
                    hook.work(result)
            if stop():
                break
        finished = share() >= 1
        if finished and result is not None:
            for hook in hooks:
                if hook.at_end and not hook.due(self.step):
                    hook.work(result)
        return finished

    def take_step(self, batch: Sequence[MicroBatch], share: float) -> StepResult:
        """One optimiser step, all of it queued on the device."""
        rate = self.set_rate(share)
        total = torch.zeros((), device=batch[0][0].device)
        beside: dict[str, Tensor] = {}
        for number, (x_BT, targets, weight) in enumerate(batch):
            scaled = weight * (1.0 / len(batch))
            self.look(x_BT)
            loss = self.micro_step(x_BT, targets, scaled, number == 0)
            total += loss * weight / len(batch)
            for name, value in self.micro_step.beside.items():
                beside[name] = beside[name] + value * scaled if number else value * scaled
        norm = None if self.clip_norm is None else clip_gradients(self.model, self.clip_norm)
        self.optimizer.step()
        self.cache.clear()
        self.micro_step.end(self.optimizer)
        self.step += 1
        return StepResult(rate, total, norm, beside, x_BT)

    def set_rate(self, share: float) -> float:
        """Give the optimiser the rate of the next step, and return it."""
        rate = self.rate(self.step, share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate
