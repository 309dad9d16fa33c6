"""Fine-tuning with one seed: a fresh head on the given encoder, some epochs, scores after each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.evaluate.glue import glue_scores
from nomatmul.finetune.checkpoint import Position, SeedCheckpoint
from nomatmul.finetune.data import Encoded, scoring_batches, training_batches
from nomatmul.finetune.results import SeedResult
from nomatmul.finetune.tasks import Task
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.micro_step import GraphedMicroStep, MicroStep
from nomatmul.train.optimizer import decay_groups

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
    bfloat16: bool = False


def rate_at(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine to zero."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(steps - warm, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_seed(
    model: Any,
    task: Task,
    train: Encoded,
    held_out: dict[str, Encoded],
    settings: Settings,
    seed: int,
    report: Report = lambda share, words: None,
    checkpoint: SeedCheckpoint | None = None,
) -> SeedResult:
    """Train `model`, in place, on its device. torch's random state decides its dropout.

    checkpoint: where to go on from, and where to save; on a CPU the result is the same, bit for
    bit, however often the seed was stopped. Raises RuntimeError when the loss is no longer finite,
    Stopped behind a signal.
    """
    began = time.monotonic()
    optimizer, cache = _optimizer(model, settings), ternary_cache()
    device = train.ids.device
    graphed = device.type == "cuda"
    micro = _micro_step(model, settings, device, cache.clear)
    one = torch.ones((), device=device)
    per_epoch = -(-len(train) // settings.batch_size)
    at = Position() if checkpoint is None else checkpoint.read(model, optimizer)
    steps, step, before = per_epoch * settings.epochs, at.epoch * per_epoch + at.batch, at.seconds
    scores: dict[str, dict[str, float]] = {}
    report(step / steps, "starting")
    for epoch in range(at.epoch, settings.epochs):
        model.train()
        total = torch.full((), at.total, dtype=torch.float64, device=device)
        with cache:
            batches = training_batches(train, settings.batch_size, seed, epoch)
            for places in itertools.islice(batches, at.batch, None):
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(settings, step, steps)
                x_BT, y_B = train.batch(places, settings.batch_size if graphed else 0)
                loss = micro(x_BT, y_B, one, True)
                total += loss.double() * len(places)
                optimizer.step()
                cache.clear()
                micro.end(optimizer)
                step += 1
                at.batch += 1
                if step % _LOOK == 0:
                    words = f"epoch {epoch + 1}/{settings.epochs}  loss {_finite(loss)}"
                    report(step / steps, words)
                if checkpoint is not None and at.batch < per_epoch:
                    here = functools.partial(_here, at, total, before + time.monotonic() - began)
                    checkpoint.after_step(model, optimizer, here)
        at.losses.append(float(_finite(total / len(train))))
        last = epoch + 1 == settings.epochs
        names = list(held_out) if last else list(held_out)[:1]
        scores = {name: score(model, task, held_out[name], settings.bfloat16) for name in names}
        at.history.append(next(iter(scores.values())))
        report(step / steps, f"epoch {epoch + 1}: {words_of(at.history[-1])}")
        at.epoch, at.batch, at.total = epoch + 1, 0, 0.0
        at.seconds = before + time.monotonic() - began
        if checkpoint is not None and not last:
            checkpoint.after_step(model, optimizer, lambda: at)
    return SeedResult(seed, scores, at.losses, at.history, at.seconds)


def _here(at: Position, total: Tensor, seconds: float) -> Position:
    return dataclasses.replace(at, total=total.item(), seconds=seconds)


def _optimizer(model: Any, settings: Settings) -> torch.optim.AdamW:
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        decay_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        eps=settings.epsilon,
        fused=device.type == "cuda",
    )


def _micro_step(
    model: Any, settings: Settings, device: torch.device, clear_cache: Callable[[], Any]
) -> MicroStep:
    """Forward and backward of a batch; on a GPU recorded once and replayed in one launch.

    Small batches leave a GPU waiting for the host, so there all batches have one shape.
    """

    def loss(ids_BT: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = _logits(model, ids_BT, settings.bfloat16)
        value = loss_of(logits_BC, labels_B)
        return value, value

    if device.type == "cuda":
        return GraphedMicroStep(loss, 0.0, 1.0, clear_cache)
    return MicroStep(loss, 0.0, 1.0)


def _logits(model: Any, ids_BT: Tensor, low: bool) -> Tensor:
    """float32 [B, C] of ids with -1 behind each row's end."""
    mask_BT = ids_BT >= 0
    with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=low):
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
def predict(model: Any, data: Encoded, low: bool = False) -> np.ndarray:
    """float64 [R]: the class with the largest logit, or the number of a regression."""
    model.eval()
    found = np.zeros(len(data))
    for places in scoring_batches(data, _SCORING_ROWS):
        logits_BC = _logits(model, data.batch(places)[0], low)
        answer = logits_BC[:, 0] if logits_BC.shape[1] == 1 else logits_BC.argmax(-1)
        found[places] = answer.double().cpu().numpy()
    return found


def score(model: Any, task: Task, data: Encoded, low: bool = False) -> dict[str, float]:
    """The task's metrics on these rows."""
    return glue_scores(task.metrics, predict(model, data, low), data.labels.cpu().numpy())


def words_of(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
