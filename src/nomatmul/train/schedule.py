"""Learning rate as a pure function of the step and of the run's progress."""

from __future__ import annotations

import math

from nomatmul.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of optimiser step `step` (from 0).

    progress: share of the run that is over, in [0, 1]: step / steps, or elapsed / time limit.
    Warm-up is linear over warmup_steps. "cosine_halved" is the published schedule (arXiv
    2406.02528): cosine over the whole run, with the peak halved from the midpoint on.
    """
    progress = min(max(progress, 0.0), 1.0)
    shape = _SHAPES[config.schedule](progress)
    rate = config.learning_rate * (config.final_rate + (1 - config.final_rate) * shape)
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": _cosine,
    "cosine_halved": lambda progress: _cosine(progress) * (1.0 if progress < 0.5 else 0.5),
}
