"""Learning rate as a pure function of the step and of the run's progress."""

from __future__ import annotations

import math

from nomatmul.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of optimiser step `step` (from 0).

    progress: share of the run that is over, in [0, 1]: step / steps, or elapsed / time limit.
    Warm-up is linear over warmup_steps. "cosine_halved" is the published schedule (arXiv
    2406.02528): cosine over the whole run, with the peak halved from the midpoint on. "triangle" is
    that of crammed BERT and UltraFastBERT (arXiv 2212.14034, 2311.10770): it rises in a line from a
    quarter of the rate until three quarters of the run are over, then falls in a line.
    """
    progress = min(max(progress, 0.0), 1.0)
    shape = _SHAPES[config.schedule](progress)
    rate = config.learning_rate * (config.final_rate + (1 - config.final_rate) * shape)
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _triangle(progress: float) -> float:
    return min(0.25 + progress, 4 * (1 - progress))


def batch_size(config: TrainConfig, progress: float, unit: int) -> int:
    """Sequences of the step at `progress`, a multiple of `unit` (a micro-batch of every rank).

    With a ramp the batch grows in a line from one unit at the start to config.batch_size when the
    share `batch_ramp` of the run is over (as crammed BERT's, arXiv 2212.14034).
    """
    if progress >= config.batch_ramp:
        return config.batch_size
    wanted = config.batch_size * progress / config.batch_ramp
    return min((int(wanted) // unit + 1) * unit, config.batch_size)


_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": _cosine,
    "triangle": _triangle,
    "cosine_halved": lambda progress: _cosine(progress) * (1.0 if progress < 0.5 else 0.5),
}
