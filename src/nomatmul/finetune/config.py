"""What a fine-tuning is asked for, and whether memory can hold it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nomatmul.finetune.loop import Settings
from nomatmul.finetune.tasks import Task
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.train.config import PRECISIONS
from nomatmul.train.memory import (
    FORCE,
    Estimate,
    OutOfMemoryError,
    activation_bytes,
    free_memory,
    gib,
    too_little,
)
from nomatmul.train.plan import DevicePlan


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What decides a result, apart from model and data. epochs: None for the task's own number.

    max_length: tokens of a row; rows: use so many training rows only (None: all). pooler: how the
    head reads the hidden states, None for what the model says. precision: auto (bfloat16 on a GPU),
    float32 or bfloat16. group_lengths: batches of rows of like length, which have less padding and
    are quicker on a CPU. Raises ValueError naming the value and the limit.
    """

    learning_rate: float = 4e-5
    batch_size: int = 16
    epochs: int | None = None
    seeds: int = 5
    max_length: int = 128
    rows: int | None = None
    weight_decay: float = 0.0
    pooler: str | None = None
    precision: str = "auto"
    group_lengths: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "seeds", "max_length", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate {self.learning_rate} must be above 0 and below 1")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight_decay {self.weight_decay} must lie in [0, 1)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: choose auto, float32 or bfloat16")

    def settings(self, task: Task) -> Settings:
        return Settings(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            epochs=self.epochs or task.epochs,
            weight_decay=self.weight_decay,
        )


def check_memory(source: Path, config: FinetuneConfig, plan: DevicePlan) -> None:
    """Raises OutOfMemoryError when the device or the host surely cannot hold the training."""
    free = free_memory(plan)
    if free is None:
        return
    model = open_checkpoint(source).config
    tokens = config.batch_size * min(config.max_length, model.max_position_embeddings)
    need = Estimate(
        states=16 * model.param_count(),
        gathered=0,
        ternary=0,
        activations=activation_bytes(model, tokens, "none", fused=False, wide=not plan.bfloat16),
        logits=0,
        host=plan.memory == "host",
    )
    if too_little(need, free):
        raise OutOfMemoryError(
            f"too little memory: about {need.text()} are needed, {gib(free)} are free; a smaller "
            f"--batch-size or --max-length needs less ({FORCE})"
        )
