"""The rows of training steps: losses and norms wait on the device until an interval ends.

Then one transfer brings them all, each step's row is written, and a value that is not finite stops
the run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from nomatmul.train.checkpoints import Checkpoints
from nomatmul.train.config import TrainConfig
from nomatmul.train.loop import Clock, StepResult
from nomatmul.train.metrics import Console, MetricsLog, NoMetrics, duration
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import Ranks


class NonFiniteError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; no checkpoint was written after it."""


@dataclasses.dataclass
class StepLog:
    """Writes what steps gave, from the one after `step` on; `samples` were read until there."""

    config: TrainConfig
    plan: DevicePlan
    ranks: Ranks
    clock: Clock
    metrics: MetricsLog | NoMetrics
    console: Console
    checkpoints: Checkpoints
    step: int  # the last one that was added
    samples: int  # read when rows were written last
    _began: float = 0.0  # what the clock showed then
    _shown: bool = False
    _names: tuple[str, ...] = ()  # of the losses beside the text's own
    # rate, samples so far, [loss, gradient norm, *losses beside it]
    _pending: list[tuple[float, int, list[Tensor]]] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        """The first step begins now."""
        self._began = self.clock.working()

    def add(self, result: StepResult, samples: int, share: float) -> None:
        """The next step's result; share: of the run that is over, for the progress bar."""
        assert result.norm is not None
        self._names = tuple(result.beside)
        column = [result.loss, result.norm, *result.beside.values()]
        self._pending.append((result.rate, samples, column))
        self.step += 1
        if self.step % self.config.log_interval == 0:
            self.flush(share)
        elif not self._shown:  # the bar moves before the first losses are fetched
            self.console.moving(share, f"step {self.step}")

    def flush(self, share: float) -> None:
        """Fetch what was added since the last time, check and write it.

        Raises NonFiniteError.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        table = torch.stack([torch.stack(column) for _, _, column in pending])
        if self.ranks.many:  # losses: of each rank's slice; norms: the same at all
            table = self.ranks.sum(table) / self.ranks.size
        values = table.tolist()  # the one wait for the device
        last = self._facts(pending[-1][1])
        first = self.step - len(pending) + 1
        row: dict[str, Any] = {}
        for step, (rate, _, _) in enumerate(pending, first):
            loss, norm, *beside = values[step - first]
            row = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate}
            row |= dict(zip(self._names, beside, strict=True))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop(row)
            self.metrics.write(row | (last if step == self.step else {}), "train")
        self.metrics.flush()
        self._show(share, row["loss"], last["tokens_per_second"])

    def _facts(self, samples: int) -> dict[str, Any]:
        """What the last row of an interval also has."""
        peak = int(self.ranks.most(self.plan.peak_bytes())[0])
        now, length = self.clock.working(), self.config.sequence_length
        read = (samples - self.samples) * length
        speed = read / max(now - self._began, 1e-9)
        self._began, self.samples = now, samples
        facts = {
            "tokens": samples * length,
            "tokens_per_second": round(speed, 1),
            "elapsed": round(self.clock.elapsed(), 3),
        }
        return facts | ({"peak_bytes": peak} if peak else {})

    def _show(self, share: float, loss: float, speed: float) -> None:
        config, self._shown = self.config, True
        if config.time_limit > 0:
            remaining = config.time_limit - self.clock.elapsed()
        else:
            left = (config.steps - self.step) * config.tokens_per_step
            remaining = left / max(speed, 1e-9)
        self.console.progress(
            min(share, 1.0),
            f"step {self.step}  loss {loss:.4f}  {speed:,.0f} tokens/s  {duration(remaining)} left",
        )

    def _stop(self, row: dict[str, Any]) -> None:
        self.metrics.flush()
        good = self.checkpoints.candidates()
        kept = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped, "
            f"{kept}. Try a lower learning_rate or a longer warm-up"
        )
