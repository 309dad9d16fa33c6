"""A pretrained decoder made ternary: its shape, its weights as the start, itself as the teacher.

The teacher is Llama- or Qwen3-shaped (transformers' form, on disk or on the Hub), or a
Transformer++ that was trained here. The student keeps its attention, norms and sizes; its embedding
and head stay floats, and every linear of its blocks becomes ternary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nomatmul._extras import require_train
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.linear_dials import SCALE_GROUPS
from nomatmul.formats.prompt_start import with_prompt_start
from nomatmul.train.args import TrainArgs
from nomatmul.train.config import TrainConfig
from nomatmul.train.overrides import apply_overrides

SCALE_GROUP = 128
"""Inputs that share a scale where nothing else is said: what the formats of others store."""

_LENGTH, _BATCH, _MICRO_BATCH, _STEPS = 2048, 64, 4, 2000
_WARM_UP = 0.05  # share of the steps


@dataclasses.dataclass(frozen=True)
class TernariseArgs(TrainArgs):
    """Arguments of `nomatmul ternarise`: `recipe` is the model, which is its start and teacher.

    Sizes that are None are the defaults of `config_of`.
    """

    scale_group: int = SCALE_GROUP
    total_tokens: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None

    @functools.cached_property
    def opened(self) -> Checkpoint:
        """The model, found once. Raises as `open_teacher`."""
        return open_teacher(self.recipe)

    def config(self) -> TrainConfig:
        """What is trained. Raises ValueError or OSError, for the model too."""
        if self.steps is not None and self.total_tokens is not None:
            raise ValueError("--steps and --total-tokens both say how long: give one of them")
        return config_of(
            self.opened.config,
            self.scale_group,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            total_tokens=self.total_tokens,
            overrides=self.overrides(),
        )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `run`."""
        own = {field.name for field in dataclasses.fields(TernariseArgs)}
        own = own - {field.name for field in dataclasses.fields(TrainArgs)} | {"opened"}
        options = {name: value for name, value in super().options().items() if name not in own}
        place = str(self.opened.directory)
        return {**options, "start": place, "teacher": place}

    def finish(self, model: str) -> None:
        """Write the values and float16 scales of the finished model in place of its floats."""
        from nomatmul.train.ternary_values import write_values

        tokens = self.opened.config
        if self.opened.found is not None:  # published: its texts may begin without its start token
            tokens = with_prompt_start(tokens, self.opened.tokenizer_path, "copied")
        write_values(Path(model), self.opened.directory, tokens)


def open_teacher(path: str) -> Checkpoint:
    """The model that is made ternary: a directory of transformers' form, a run, or hf:owner/name.

    Raises ValueError or OSError, by name, for what is no model, is packed or a GGUF file, lacks a
    tokenizer.json, or has parts that have no place here (biases, experts, sliding windows, ...).
    """
    require_train("making a model ternary")
    from nomatmul.train.teacher_files import find_teacher

    return open_checkpoint(find_teacher(path).directory)


def student_of(teacher: ModelConfig, scale_group: int = SCALE_GROUP) -> ModelConfig:
    """The ternary model of a teacher's shape, whose tensors have the teacher's names and shapes.

    scale_group: inputs of a row that share a scale (32, 64, 128, 256; activations stay floats), or
    0: one scale a matrix and int8 activations, as BitNet has them. Raises ValueError, by name, for
    a teacher that is no causal model of attention and gated layers, or whose weights are ternary
    already, and for groups that do not divide its sizes.
    """
    wanted = {
        "causal": True,
        "token_mixer": "attention",
        "channel_mixer": "glu",
        "norm": "rms",
        "positions": "rotary",
        "embedding_norm": False,
    }
    for name, value in wanted.items():
        if (found := getattr(teacher, name)) != value:
            raise ValueError(
                f"only decoders of Llama's shape are made ternary: the model has {name} {found!r},"
                f" not {value!r}"
            )
    if teacher.linear != "dense":
        raise ValueError("the model's linear layers are ternary already: `nomatmul pack` takes it")
    _check_group(teacher, scale_group)
    return dataclasses.replace(
        teacher,
        linear="ternary",
        linear_norm="none",
        rounding="even",
        split_gate=scale_group == 0,
        scale_group=scale_group,
        head_linear="dense",
        embedding_linear="dense",
    )


def config_of(
    teacher: ModelConfig,
    scale_group: int = SCALE_GROUP,
    *,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    total_tokens: int | None = None,
    overrides: Iterable[str] = (),
) -> TrainConfig:
    """The run that makes a teacher's ternary model, the teacher's distribution its only target.

    total_tokens: in place of a number of steps, rounded up to whole ones. overrides: "name=value",
    as of `apply_overrides`, but none of the model. Raises ValueError naming what is wrong.
    """
    student, overrides = student_of(teacher, scale_group), list(overrides)
    for assignment in overrides:
        if assignment.lstrip().startswith("model."):
            raise ValueError(f"override {assignment!r}: the model's shape is the teacher's")
    length = min(_LENGTH, student.max_position_embeddings)
    length = (
        length if sequence_length is None else _at_least_one("sequence-length", sequence_length)
    )
    batch = _BATCH if batch_size is None else _at_least_one("batch-size", batch_size)
    micro = max(size for size in range(1, min(batch, _MICRO_BATCH) + 1) if batch % size == 0)
    steps = _STEPS
    if total_tokens is not None:
        steps = -(-_at_least_one("total-tokens", total_tokens) // (length * batch))
    config = TrainConfig(
        recipe="ternarise",
        model=student,
        sequence_length=length,
        batch_size=batch,
        micro_batch_size=micro,
        steps=steps,
        learning_rate=rate_of(student.hidden_size),
        schedule="linear",
        teacher_share=1.0,
        loss_chunks=8 if length * micro % 8 == 0 else 1,
    )
    config = apply_overrides(config, overrides)
    named = {assignment.partition("=")[0].strip().replace("-", "_") for assignment in overrides}
    if "warmup_steps" in named:
        return config
    return dataclasses.replace(config, warmup_steps=max(1, round(_WARM_UP * config.steps)))


def rate_of(hidden_size: int) -> float:
    """The peak learning rate: what served a width of 128 best, falling as widths grow."""
    return 0.128 / hidden_size


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} {value} must be at least 1")
    return value


def _check_group(teacher: ModelConfig, group: int) -> None:
    """Raise ValueError for a group that does not divide all inputs, with those that do."""
    legal = (0, *SCALE_GROUPS)
    if group not in legal:
        raise ValueError(f"scale-group {group} is unknown: choose {', '.join(map(str, legal))}")
    widths = sorted({teacher.hidden_size, teacher.num_heads * teacher.head_size, teacher.mlp_size})
    fitting = [g for g in legal if not g or all(width % g == 0 for width in widths)]
    if group not in fitting:
        raise ValueError(
            f"scale-group {group} does not divide the model's widths"
            f" {', '.join(map(str, widths))}: choose {' or '.join(map(str, fitting))}"
        )
