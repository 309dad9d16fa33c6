"""The training loop. It never waits for the device between reports.

Losses and gradient norms stay on the device until a log interval ends; then one transfer brings
them all, each step's row is written, and a value that is not finite stops the run.

With many ranks every one runs this loop on its slice of each batch. What decides the course (the
clock, a request to stop) is agreed on by all after each step; only rank 0 prints and writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from nomatmul.formats.special_tokens import mask_id
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.batches import Batches, Slice, WindowOrder
from nomatmul.train.checkpoints import Checkpoints, Progress
from nomatmul.train.config import TrainConfig
from nomatmul.train.diagnostics import Diagnostics
from nomatmul.train.evaluation import Evaluator, MaskedEvaluator, sample_text
from nomatmul.train.fff_training import counting, usage_row
from nomatmul.train.masking import Masking
from nomatmul.train.metrics import Console, MetricsLog, NoMetrics, duration
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.optimizer import build_loss, clip_gradients
from nomatmul.train.parallelize import eager, free_gathered
from nomatmul.train.ranks import Ranks
from nomatmul.train.schedule import batch_size, learning_rate
from nomatmul.train.tokens import TokenStream


class NonFiniteError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; no checkpoint was written after it."""


@dataclasses.dataclass
class _Clock:
    """Seconds in the loop, over all starts of a run, and those of them not spent on steps."""

    before: float
    started: float = dataclasses.field(default_factory=time.monotonic)
    aside: float = 0.0

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def working(self) -> float:
        return self.elapsed() - self.aside


class Trainer:
    """One run from `progress` to its end, or to a stop request.

    stop_requested: asked after every step, the number of the signal or 0. model, optimizer and the
    streams are on `device` and in the state that `progress` says.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        train: TokenStream,
        valid: TokenStream | None,
        out: Path,
        device: torch.device,
        progress: Progress,
        *,
        console: Console,
        checkpoints: Checkpoints,
        stop_requested: Callable[[], int] = lambda: 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.tokenizer = (
            config,
            model,
            optimizer,
            tokenizer,
        )
        self.out, self.device, self.console = out, device, console
        self.checkpoints, self.stop_requested = checkpoints, stop_requested
        self.ranks = ranks = ranks if ranks is not None else Ranks.alone()
        order = WindowOrder(len(train), config.sequence_length, config.seed)
        # While the batch grows its size is not fixed: then ranks take turns at micro-batches.
        self.unit = config.micro_batch_size * ranks.size
        share = Slice(self.unit if config.batch_ramp else config.batch_size, ranks.rank, ranks.size)
        masking = _masking(config, tokenizer)
        self.batches = Batches(train, order, config.micro_batch_size, device, share, masking)
        self.evaluator: Evaluator | MaskedEvaluator | None = None
        if valid is not None and masking is not None:
            self.evaluator = MaskedEvaluator(valid, config, device, model, masking, ranks)
        elif valid is not None:
            self.evaluator = Evaluator(valid, config, device, ranks)
        self.loss = build_loss(model, config, device)
        self._ternary = ternary_cache()
        self.micro_step = build_micro_step(
            self.loss, config, device, 1, self._ternary.clear, many=ranks.many
        )
        self.diagnostics = Diagnostics(model, ranks)
        self.metrics = MetricsLog(out, progress.step) if ranks.first else NoMetrics()
        if not self.metrics.has_tensorboard:
            console.say("note: tensorboard is not installed, metrics go to metrics.jsonl only")
        self.step = progress.step
        samples = progress.samples
        self.samples = progress.step * config.batch_size if samples is None else samples
        self.clock = _Clock(progress.elapsed)
        self.stopped_by = 0  # the signal that ended the run early
        self._agreed = progress.elapsed  # the clock that all ranks go by
        # rate, samples so far, [loss, gradient norm, auxiliary loss if there is one]
        self._pending: list[tuple[float, int, list[Tensor]]] = []
        self._flushed_at, self._flushed_samples = self.clock.working(), self.samples
        self._saved_step = progress.step
        self._saved_at = progress.elapsed
        self._speed: float | None = None  # tokens a second at the last report

    def run(self) -> bool:
        """Train. True: the end is reached and saved; False: stopped on request, and saved.

        Raises NonFiniteError, CheckpointError.
        """
        self.model.train()
        batches = self.batches.run(self.samples)
        self.clock = _Clock(self.clock.before)
        self._flushed_at = self.clock.working()
        self._saved_at = self._elapsed()
        self.console.start(self.config.recipe)
        x_BT = None
        try:
            with self._ternary, self.ranks.speaking():
                self._agree()
                while not self._finished():
                    self.ranks.begin(f"training step {self.step + 1}")
                    x_BT = self._train_step(batches)
                    self._report(x_BT)
                    if self._agree():
                        break
                return self._end(x_BT)
        finally:
            batches.close()  # type: ignore[attr-defined]
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

    def _finished(self) -> bool:
        return self.share_done() >= 1

    def _train_step(self, batches: Any) -> Tensor:
        """One optimiser step, all of it queued on the device. Returns the last inputs."""
        config = self.config
        progress = self.share_done()
        rate = learning_rate(config, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        auxiliary: Tensor | None = None
        samples = batch_size(config, progress, self.unit)
        accumulation = samples // self.unit
        micro_batches = [next(batches) for _ in range(accumulation)]
        weights = self._weights([y_BT for _, y_BT in micro_batches])
        for number, (x_BT, y_BT) in enumerate(micro_batches):
            scaled = weights[number] * (1.0 / accumulation)
            loss = self.micro_step(x_BT, y_BT, scaled, number == 0)
            total += loss * weights[number] / accumulation
            if self.micro_step.auxiliary is not None:
                part = self.micro_step.auxiliary * scaled
                auxiliary = part if auxiliary is None else auxiliary + part
        norm = clip_gradients(self.model, config.clip_norm)
        self.optimizer.step()
        self._ternary.clear()
        self.micro_step.end(self.optimizer)
        self.step += 1
        self.samples += samples
        column = [total, norm] if auxiliary is None else [total, norm, auxiliary]
        self._pending.append((rate, self.samples, column))
        return x_BT

    def _weights(self, targets: list[Tensor]) -> list[Tensor]:
        """What each micro-batch's mean counts, 1 for all when they have as many targets.

        Ranks and micro-batches are averaged; by this the mean is that over all targets of the
        batch, whoever holds them.
        """
        counts = torch.stack([(y_BT != -100).sum() for y_BT in targets]).double()
        mean = self.ranks.sum_on_device(counts.sum()) / (len(targets) * self.ranks.size)
        return list((counts / mean.clamp(min=1e-9)).float().unbind())

    def _report(self, x_BT: Tensor) -> None:
        """Everything that is due after this step."""
        config, step = self.config, self.step
        if step % config.log_interval == 0:
            self._flush()
        elif self._speed is None:  # the bar moves before the first losses are fetched
            self.console.moving(self.share_done(), f"step {step}")
        self._look(x_BT, lambda interval: step % interval == 0)
        since = self._elapsed() - self._saved_at
        by_time = config.checkpoint_seconds > 0 and since >= config.checkpoint_seconds
        by_step = config.checkpoint_interval > 0 and step % config.checkpoint_interval == 0
        if (by_time or by_step) and not self._finished():
            self._aside(self._save, "saving a checkpoint")

    def _look(self, x_BT: Tensor, due: Callable[[int], bool]) -> None:
        """Held-out loss, diagnostics and sample, those of them that are due."""
        config = self.config
        for work, name, interval, possible in (
            (self._evaluate, "evaluating", config.eval_interval, self.evaluator is not None),
            (lambda: self._diagnose(x_BT), "diagnostics", config.diagnostics_interval, True),
            (self._sample, "sampling", config.sample_interval, self._can_sample()),
        ):
            if interval > 0 and possible and due(interval):
                self._aside(work, name)

    def _end(self, x_BT: Tensor | None) -> bool:
        """The last reports, unless this step has had them, and the last checkpoint."""
        finished, step = self._finished(), self.step
        self._flush()
        if finished and x_BT is not None:
            self._look(x_BT, lambda interval: step % interval != 0)
        self.ranks.begin("saving the last checkpoint")
        self._save()
        return finished

    def _aside(self, work: Callable[[], None], name: str) -> None:
        """Do something that is no training step, and keep its time out of tokens/s."""
        self._flush()
        began = time.monotonic()
        self.ranks.begin(f"{name} at step {self.step}")
        work()
        free_gathered(self.model)
        self.clock.aside += time.monotonic() - began

    def _flush(self) -> None:
        """Fetch losses and norms of the steps since the last time, check and write them."""
        if not self._pending:
            return
        table = torch.stack([torch.stack(column) for _, _, column in self._pending])
        if self.ranks.many:  # losses: of each rank's slice; norms: the same at all
            table = self.ranks.sum(table) / self.ranks.size
        values = table.tolist()  # the one wait for the device
        peak = self._peak_bytes()
        pending, self._pending = self._pending, []
        count, first = len(pending), self.step - len(pending) + 1
        now, length = self.clock.working(), self.config.sequence_length
        read = (self.samples - self._flushed_samples) * length
        speed = read / max(now - self._flushed_at, 1e-9)
        self._flushed_at, self._flushed_samples = now, self.samples
        self._speed = speed
        row: dict[str, Any] = {}
        for index, (rate, samples, _) in enumerate(pending):
            loss, norm, *auxiliary = values[index]
            row = {"step": first + index, "loss": loss, "grad_norm": norm, "learning_rate": rate}
            if auxiliary:
                row["auxiliary_loss"] = auxiliary[0]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop_non_finite(row)
            if index == count - 1:
                row |= {
                    "tokens": samples * length,
                    "tokens_per_second": round(speed, 1),
                    "elapsed": round(self.clock.elapsed(), 3),
                }
                if peak:
                    row["peak_bytes"] = peak
            self.metrics.write(row, "train")
        self.metrics.flush()
        self._show(row)

    def _peak_bytes(self) -> int:
        """Device memory at its fullest, of the rank that needed most."""
        if self.device.type != "cuda":
            return 0
        return int(self.ranks.most(torch.cuda.max_memory_allocated(self.device))[0])

    def _show(self, row: dict[str, Any]) -> None:
        config = self.config
        share = min(self.share_done(), 1.0)
        if config.time_limit > 0:
            remaining = config.time_limit - self.clock.elapsed()
        else:
            left = (config.steps - self.step) * config.tokens_per_step
            remaining = left / max(row["tokens_per_second"], 1e-9)
        self.console.progress(
            share,
            f"step {self.step}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{duration(remaining)} left",
        )

    def _stop_non_finite(self, row: dict[str, Any]) -> None:
        self.metrics.flush()
        good = self.checkpoints.candidates()
        kept = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped, "
            f"{kept}. Try a lower learning_rate or a longer warm-up"
        )

    def _evaluate(self) -> None:
        assert self.evaluator is not None
        with counting(self.model):
            result = self.evaluator.evaluate(self.loss)
            used = usage_row(self.model, self.ranks)
        self.metrics.write({"step": self.step, **result.row()}, "valid")
        said = f"step {self.step}: held-out {result.text()}"
        if used:
            self.metrics.write({"step": self.step, **used}, "diagnostics")
            said += f"; nodes never visited {used['fff_dead']:.1%}"
        self.console.say(said)

    def _diagnose(self, x_BT: Tensor) -> None:
        if row := self.diagnostics.report(x_BT[:1]):
            self.metrics.write({"step": self.step, **row}, "diagnostics")

    def _can_sample(self) -> bool:
        return self.config.sample_tokens > 0 and self.config.model.causal

    def _sample(self) -> None:
        agree = self.ranks.from_first if self.ranks.many else int
        with eager(self.model):
            text = sample_text(self.model, self.tokenizer, self.config, self.device, agree=agree)
        if not self.ranks.first:
            return
        with open(self.out / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {self.step} ---\n{text}\n")
        self.metrics.write_text(text, self.step)
        self.console.say(f"step {self.step}, sample: {' '.join(text.split())[:300]}")

    def _save(self) -> None:
        if self._saved_step == self.step and self.ranks.from_first(self._has_checkpoint()):
            return
        self.metrics.sync()
        progress = Progress(self.step, self.clock.elapsed(), self.samples)
        self.checkpoints.save(self.model, self.optimizer, self.tokenizer, self.config, progress)
        self._saved_step, self._saved_at = self.step, self._elapsed()

    def _has_checkpoint(self) -> bool:
        return bool(self.checkpoints.candidates())


def _masking(config: TrainConfig, tokenizer: Tokenizer) -> Masking | None:
    """How an encoder's batches are masked; None for a causal model."""
    if config.model.causal:
        return None
    vocabulary = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return Masking(config.masked_tokens, mask_id(tokenizer), vocabulary, config.seed)
