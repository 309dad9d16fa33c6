"""Fine-tuning with one seed: a fresh head on the given encoder, some epochs, scores after each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.evaluate.glue import glue_scores
from nomatmul.finetune.checkpoint import Position, SeedCheckpoint
from nomatmul.finetune.data import Encoded, Order, scoring_batches
from nomatmul.finetune.results import SeedResult
from nomatmul.finetune.tasks import Task
from nomatmul.models.base import TextModel
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.loop import Clock, Hook, Loop, MicroBatch, StepResult, every
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.optimizer import decay_groups
from nomatmul.train.plan import DevicePlan

_SCORING_ROWS = 128
_LOOK = 50  # steps between reports of the loss

Report = Callable[[float, str], None]  # share of the seed that is done, words


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one seed is trained; the authors' values (arXiv 2311.10770, eval/GLUE_sane)."""

    learning_rate: float = 4e-5
    batch_size: int = 16
    epochs: int = 5
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.0
    beta2: float = 0.98
    epsilon: float = 1e-6


def rate_at(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine to zero."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(steps - warm, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_seed(
    model: TextModel,
    task: Task,
    train: Encoded,
    held_out: dict[str, Encoded],
    settings: Settings,
    seed: int,
    plan: DevicePlan,
    report: Report = lambda share, words: None,
    checkpoint: SeedCheckpoint | None = None,
) -> SeedResult:
    """Train `model`, in place, on its device. torch's random state decides its dropout.

    checkpoint: where to go on from, and where to save; on a CPU the result is the same, bit for
    bit, however often the seed was stopped. Raises RuntimeError when the loss is no longer finite,
    Stopped behind a signal.
    """
    return _Seed(model, task, train, held_out, settings, seed, plan, report, checkpoint).train()


@dataclasses.dataclass
class _Seed:
    """One seed's training: batches, scores and checkpoints around the training loop."""

    model: TextModel
    task: Task
    data: Encoded
    held_out: dict[str, Encoded]
    settings: Settings
    seed: int
    plan: DevicePlan
    report: Report
    checkpoint: SeedCheckpoint | None

    def __post_init__(self) -> None:
        settings, plan, kept = self.settings, self.plan, self.checkpoint
        optimizer, cache = _optimizer(self.model, settings, plan), ternary_cache()
        self.at = Position() if kept is None else kept.read(self.model, optimizer)
        self.clock = Clock(self.at.seconds)
        self.per_epoch = -(-len(self.data) // settings.batch_size)
        self.order = Order(self.data, settings.batch_size, self.seed)
        self.steps = self.per_epoch * settings.epochs
        self.total = torch.tensor(self.at.total, dtype=torch.float64, device=plan.device)
        self.scores: dict[str, dict[str, float]] = {}
        self.one = torch.ones((), device=plan.device)
        self.rows = 0  # of the last batch
        self.loop = Loop(
            self.model,
            optimizer,
            build_micro_step(self._loss, 0.0, plan, cache.clear),
            cache,
            rate=lambda step, share: rate_at(settings, step, self.steps),
            step=self.at.epoch * self.per_epoch + self.at.batch,
        )

    def train(self) -> SeedResult:
        self.report(self._share(), "starting")
        hooks = [
            Hook(every(1), self._add),
            Hook(every(_LOOK), self._look),
            Hook(lambda step: step % self.per_epoch != 0, lambda result: self._save()),
            Hook(every(self.per_epoch), lambda result: self._end_epoch()),
        ]
        with self.loop.cache:
            self.loop.run(self._share, self._batch, hooks)
        at = self.at
        return SeedResult(self.seed, self.scores, at.losses, at.history, at.seconds)

    def _share(self) -> float:
        return self.loop.step / self.steps

    def _loss(self, ids_BT: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        value = loss_of(_logits(self.model, ids_BT, self.plan), labels_B)
        return value, value

    def _batch(self, step: int, share: float) -> list[MicroBatch]:
        """Where steps are recorded as a graph all batches have one shape."""
        size = self.settings.batch_size
        places = self.order.places(*divmod(step, self.per_epoch))
        x_BT, y_B = self.data.batch(places, size if self.plan.graph else 0)
        self.rows = len(places)
        return [(x_BT, y_B, self.one)]

    def _add(self, result: StepResult) -> None:
        self.total += result.loss.double() * self.rows
        self.at.batch += 1

    def _look(self, result: StepResult) -> None:
        epoch = f"epoch {self.at.epoch + 1}/{self.settings.epochs}"
        self.report(self._share(), f"{epoch}  loss {_finite(result.loss)}")

    def _end_epoch(self) -> None:
        at, held_out = self.at, self.held_out
        at.losses.append(float(_finite(self.total / len(self.data))))
        last = self.loop.step == self.steps
        names = list(held_out) if last else list(held_out)[:1]
        self.scores = {n: score(self.model, self.task, held_out[n], self.plan) for n in names}
        self.model.train()
        at.history.append(next(iter(self.scores.values())))
        self.report(self._share(), f"epoch {at.epoch + 1}: {words_of(at.history[-1])}")
        at.epoch, at.batch, at.seconds = at.epoch + 1, 0, self.clock.elapsed()
        self.total.zero_()
        if not last:
            self._save()

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.after_step(self.model, self.loop.optimizer, self._here)

    def _here(self) -> Position:
        return dataclasses.replace(self.at, total=self.total.item(), seconds=self.clock.elapsed())


def _optimizer(model: nn.Module, settings: Settings, plan: DevicePlan) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        decay_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        eps=settings.epsilon,
        fused=plan.fused_adamw,
    )


def _logits(model: nn.Module, ids_BT: Tensor, plan: DevicePlan) -> Tensor:
    """float32 [B, C] of ids with -1 behind each row's end."""
    mask_BT = ids_BT >= 0
    with plan.autocast():
        output = model(input_ids=ids_BT.clamp(min=0), attention_mask=mask_BT)
    return output.logits.float()


def loss_of(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy, or mean squared error of a regression, of the labels that count."""
    if not labels_B.is_floating_point():
        return F.cross_entropy(logits_BC, labels_B, ignore_index=-100)
    counts_B = ~labels_B.isnan()
    error_B = torch.where(counts_B, logits_BC[:, 0] - labels_B.nan_to_num(), 0.0)
    return error_B.square().sum() / counts_B.sum()


def _finite(loss: Tensor) -> str:
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss became {value}: try a lower --learning-rate")
    return f"{value:.4f}"


@torch.no_grad()
def predict(model: nn.Module, data: Encoded, plan: DevicePlan) -> np.ndarray:
    """float64 [R]: the class with the largest logit, or the number of a regression."""
    model.eval()
    found = np.zeros(len(data))
    for places in scoring_batches(data, _SCORING_ROWS):
        logits_BC = _logits(model, data.batch(places)[0], plan)
        answer = logits_BC[:, 0] if logits_BC.shape[1] == 1 else logits_BC.argmax(-1)
        found[places] = answer.double().cpu().numpy()
    return found


def score(model: nn.Module, task: Task, data: Encoded, plan: DevicePlan) -> dict[str, float]:
    """The task's metrics on these rows."""
    return glue_scores(task.metrics, predict(model, data, plan), data.labels.cpu().numpy())


def words_of(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
