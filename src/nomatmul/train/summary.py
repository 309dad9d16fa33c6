"""The line that says what a run is, before it starts."""

from __future__ import annotations

import torch

from nomatmul.train.config import TrainConfig
from nomatmul.train.model import TrainedModel
from nomatmul.train.prepare import Prepared
from nomatmul.train.ranks import Ranks
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_cache import CachedTeacher


def summary(
    config: TrainConfig,
    data: Prepared,
    model: TrainedModel,
    device: torch.device,
    ranks: Ranks,
    teacher: Teacher | CachedTeacher | None,
) -> str:
    """Sizes of model and data, the run's length, and who teaches."""
    count = sum(parameter.numel() for parameter in model.parameters())
    held = f", {len(data.valid):,} held out" if data.valid is not None else ""
    epochs = config.steps * config.tokens_per_step / len(data.train)
    length = (
        f"{config.time_limit:g} seconds"
        if config.time_limit > 0
        else f"{config.steps:,} steps ({epochs:.2f} epochs)"
    )
    taught = ""
    if teacher is not None:
        taught = f"; teacher {teacher.files.path}: {teacher.parameters:,} parameters"
    where = f"{ranks.size} x {device.type}" if ranks.many else str(device)
    return (
        f"{config.recipe}: {count:,} parameters on {where}; {len(data.train):,} tokens{held}; "
        f"{config.tokens_per_step:,} tokens a step, {length}{taught}"
    )
