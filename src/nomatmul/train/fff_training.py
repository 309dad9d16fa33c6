"""What fast feedforward layers are told in training, step by step, and what they add to the loss.

The knobs are TrainConfig's `fff_...`; the layers themselves are in models/fff.py. Decisions may be
soft at the start: over the first `fff_soft_share` of the run their softness falls in a line from 1
to 0, and from then on training computes what inference does.
"""

from __future__ import annotations

from torch import nn

from nomatmul.train.config import FFF_FIELDS, TrainConfig


def wants_auxiliary(config: TrainConfig) -> bool:
    """Does this run add an auxiliary loss of the trees?"""
    return config.fff_balance > 0 or config.fff_hardening > 0


def softness(config: TrainConfig, progress: float) -> float:
    """How soft decisions are when the share `progress` of the run is over, in [0, 1]."""
    if config.fff_soft_share <= 0:
        return 0.0
    return max(0.0, 1.0 - progress / config.fff_soft_share)


class FFFSchedule:
    """Hands the knobs to the model, and the softness before every step."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.active = any(getattr(config, name) for name in FFF_FIELDS)

    def set(self, progress: float) -> None:
        """To be called before each step. progress: share of the run that is over."""
