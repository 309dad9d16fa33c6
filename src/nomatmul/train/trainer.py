"""Pretraining: the loop with what it reports, evaluates and saves.

With many ranks each runs this on its slice of each batch. All agree after each step on what time
it is and whether to stop; only rank 0 prints and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nomatmul.formats.special_tokens import mask_id
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.batches import Batches, Slice, WindowOrder
from nomatmul.train.checkpoints import Checkpoints, Progress
from nomatmul.train.config import TrainConfig
from nomatmul.train.diagnostics import Diagnostics
from nomatmul.train.evaluation import Evaluator, MaskedEvaluator, sample_text
from nomatmul.train.fff_training import counting, usage_row
from nomatmul.train.loop import Clock, Hook, Loop, MicroBatch, StepResult, every, nobody_looks
from nomatmul.train.masking import Masking
from nomatmul.train.metrics import Console, MetricsLog, NoMetrics
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.model import TrainedModel
from nomatmul.train.optimizer import build_loss
from nomatmul.train.parallelize import eager, free_gathered
from nomatmul.train.plan import DevicePlan
from nomatmul.train.prepare import Prepared
from nomatmul.train.ranks import Ranks
from nomatmul.train.schedule import batch_size, learning_rate
from nomatmul.train.step_log import StepLog
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_cache import CachedTeacher


class Trainer:
    """One run from `progress` to its end, or to a stop request.

    stop_requested: asked after every step, the number of the signal or 0. model, optimizer and the
    data are on the plan's device and in the state that `progress` says.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: DevicePlan,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        data: Prepared,
        progress: Progress,
        *,
        out: Path,
        console: Console,
        checkpoints: Checkpoints,
        ranks: Ranks,
        stop_requested: Callable[[], int] = lambda: 0,
        teacher: Teacher | CachedTeacher | None = None,
    ) -> None:
        self.config, self.plan, self.model, self.optimizer = config, plan, model, optimizer
        self.tokenizer, self.console = data.tokenizer, console
        self.checkpoints, self.stop_requested, self.ranks = checkpoints, stop_requested, ranks
        # While the batch grows its size is not fixed: then ranks take turns at micro-batches.
        self.unit = config.micro_batch_size * ranks.size
        share = Slice(self.unit if config.batch_ramp else config.batch_size, ranks.rank, ranks.size)
        masking = _masking(config, data.tokenizer)
        cached = config.teacher_top > 0  # of the first epoch's windows
        order = WindowOrder(len(data.train), config.sequence_length, config.seed, cached)
        self.batches = Batches(data.train, order, config.micro_batch_size, plan, share, masking)
        self.evaluator = _evaluator(config, plan, model, data, masking, ranks)
        self.teacher, taught = teacher, None
        if teacher is not None:
            taught = teacher.taught(config.teacher_share, config.temperature)
        self.loss = build_loss(model, config, plan, taught)
        self.loop = self._loop(progress.step)
        self.diagnostics = Diagnostics(model, ranks)
        self.metrics = MetricsLog(out, progress.step) if ranks.first else NoMetrics()
        if not self.metrics.has_tensorboard:
            console.log("note: tensorboard is not installed, metrics go to metrics.jsonl only")
        samples = progress.samples
        self.samples = progress.step * config.batch_size if samples is None else samples
        self.clock = Clock(progress.elapsed)
        self.full_precision = False  # of the model's weights, now
        self.stopped_by = 0  # the signal that ended the run early
        self._agreed = progress.elapsed  # the clock that all ranks go by
        self.log = StepLog(
            config, plan, ranks, self.clock, self.metrics, console, checkpoints,
            self.step, self.samples,
        )  # fmt: skip
        self._saved_step, self._saved_at = progress.step, progress.elapsed

    def _loop(self, step: int) -> Loop:
        config, cache = self.config, ternary_cache()
        return Loop(
            self.model,
            self.optimizer,
            build_micro_step(self.loss, config.z_loss, self.plan, cache.clear),
            cache,
            rate=lambda step, share: learning_rate(config, step, share),
            clip_norm=config.clip_norm,
            step=step,
            look=nobody_looks if self.teacher is None else self.teacher.look,
        )

    @property
    def step(self) -> int:
        """Optimiser steps that are done, of earlier processes too."""
        return self.loop.step

    def run(self) -> bool:
        """Train. True: the end is reached and saved; False: stopped on request, and saved.

        Raises NonFiniteError, CheckpointError.
        """
        batches = self.batches.run(self.samples)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.follow(self.batches.starts(self.samples))
        self.clock.restart()
        self.log.start()
        self._saved_at = self._elapsed()
        self.console.start(self.config.recipe)
        try:
            with self.loop.cache, self.ranks.speaking():
                self._agree()
                finished = self.loop.run(
                    self.share_done,
                    lambda step, share: self._batch(batches, step, share),
                    self._hooks(),
                    stop=lambda: self._agree() > 0,
                )
                self.log.flush(self.share_done())
                self.ranks.begin("saving the last checkpoint")
                self._save()
                return finished
        finally:
            batches.close()
            self.console.stop()
            self.metrics.close()

    def share_done(self) -> float:
        """Share of the run that is over: by the clock if there is a time limit, else by steps."""
        if self.config.time_limit > 0:
            return max(self._elapsed() / self.config.time_limit, self.step / self.config.steps)
        return self.step / self.config.steps

    def _elapsed(self) -> float:
        """The clock by which decisions are taken: the same at every rank."""
        return self._agreed if self.ranks.many else self.clock.elapsed()

    def _agree(self) -> int:
        """Whether to stop, by a signal to any rank; and what time it is."""
        stop, self._agreed = self.ranks.most(self.stop_requested(), self.clock.elapsed())
        self.stopped_by = int(stop)
        return self.stopped_by

    def _batch(
        self, batches: Iterator[tuple[Tensor, Tensor]], step: int, share: float
    ) -> list[MicroBatch]:
        self.ranks.begin(f"training step {step + 1}")
        self._enter_phase(share)
        samples = batch_size(self.config, share, self.unit)
        self.samples += samples
        pairs = [next(batches) for _ in range(samples // self.unit)]
        weights = target_weights([y_BT for _, y_BT in pairs], self.ranks)
        return [(x_BT, y_BT, w) for (x_BT, y_BT), w in zip(pairs, weights, strict=True)]

    def _enter_phase(self, share: float) -> None:
        """Round the weights or not, until the next step: what looks at the model sees the same."""
        full = share < self.config.full_precision
        if full == self.full_precision:
            return
        self.full_precision = full
        self.model.set_full_precision(full)
        self.loop.cache.clear()
        self.loop.micro_step.forget()
        if not full:
            self.console.log(f"step {self.step}: weights are ternary from now on")

    def _hooks(self) -> list[Hook]:
        """What is done between steps, in this order."""
        config = self.config
        hooks = [
            Hook(every(1), lambda result: self.log.add(result, self.samples, self.share_done()))
        ]
        for name, interval, work, possible in (
            ("evaluating", config.eval_interval, self._evaluate, self.evaluator is not None),
            ("diagnostics", config.diagnostics_interval, self._diagnose, True),
            ("sampling", config.sample_interval, self._sample, self._can_sample()),
        ):
            if interval > 0 and possible:
                hooks.append(Hook(every(interval), self._aside(name, work), at_end=True))
        save = self._aside("saving a checkpoint", lambda result: self._save())
        return [*hooks, Hook(self._save_due, save)]

    def _aside(
        self, name: str, work: Callable[[StepResult], object]
    ) -> Callable[[StepResult], None]:
        """`work` as something that is no training step: its time is kept out of tokens/s."""

        def aside(result: StepResult) -> None:
            self.log.flush(self.share_done())
            with self.clock.paused():
                self.ranks.begin(f"{name} at step {self.step}")
                work(result)
                free_gathered(self.model)

        return aside

    def _save_due(self, step: int) -> bool:
        config, since = self.config, self._elapsed() - self._saved_at
        by_time = config.checkpoint_seconds > 0 and since >= config.checkpoint_seconds
        return (by_time or every(config.checkpoint_interval)(step)) and self.share_done() < 1

    def _evaluate(self, result: StepResult) -> None:
        assert self.evaluator is not None
        with counting(self.model):
            held_out = self.evaluator.evaluate(self.loss)
            used = usage_row(self.model, self.ranks)
        self.metrics.write({"step": self.step, **held_out.row()}, "valid")
        line = f"step {self.step}: held-out {held_out.text()}"
        if used:
            self.metrics.write({"step": self.step, **used}, "diagnostics")
            line += f"; nodes never visited {used['fff_dead']:.1%}"
        self.console.log(line)

    def _diagnose(self, result: StepResult) -> None:
        if row := self.diagnostics.report(result.inputs[:1]):
            self.metrics.write({"step": self.step, **row}, "diagnostics")

    def _can_sample(self) -> bool:
        return self.config.sample_tokens > 0 and self.config.model.causal

    def _sample(self, result: StepResult) -> None:
        agree = self.ranks.from_first if self.ranks.many else int
        with eager(self.model):
            text = sample_text(self.model, self.tokenizer, self.config, self.plan, agree=agree)
        self.metrics.write_text(text, self.step)
        self.console.log(f"step {self.step}, sample: {' '.join(text.split())[:300]}")

    def _save(self) -> None:
        if self._saved_step == self.step and self.ranks.from_first(self._has_checkpoint()):
            return
        self.metrics.sync()
        progress = Progress(self.step, self.clock.elapsed(), self.samples)
        self.checkpoints.save(self.model, self.optimizer, self.tokenizer, self.config, progress)
        self._saved_step, self._saved_at = self.step, self._elapsed()

    def _has_checkpoint(self) -> bool:
        return bool(self.checkpoints.candidates())


def target_weights(targets: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """What each micro-batch's mean counts, 1 for all when they have as many targets.

    Ranks and micro-batches are averaged; by this the mean is that over all targets of the
    batch, whoever holds them.
    """
    counts = torch.stack([(y_BT != -100).sum() for y_BT in targets]).double()
    mean = ranks.sum_on_device(counts.sum()) / (len(targets) * ranks.size)
    return list((counts / mean.clamp(min=1e-9)).float().unbind())


def _evaluator(
    config: TrainConfig,
    plan: DevicePlan,
    model: TrainedModel,
    data: Prepared,
    masking: Masking | None,
    ranks: Ranks,
) -> Evaluator | MaskedEvaluator | None:
    """What scores the held-out text; None where there is none."""
    if data.valid is None:
        return None
    if masking is None:
        return Evaluator(data.valid, config, plan, ranks)
    return MaskedEvaluator(data.valid, config, plan, model, masking, ranks)


def _masking(config: TrainConfig, tokenizer: Tokenizer) -> Masking | None:
    """How an encoder's batches are masked; None for a causal model."""
    if config.model.causal:
        return None
    vocabulary = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return Masking(config.masked_tokens, mask_id(tokenizer), vocabulary, config.seed)
