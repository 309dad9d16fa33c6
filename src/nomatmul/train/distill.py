"""What the command `nomatmul distill` is given: a training, and who teaches it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nomatmul._extras import require_train
from nomatmul.train.args import TrainArgs
from nomatmul.train.config import TrainConfig
from nomatmul.train.overrides import apply_overrides
from nomatmul.train.recipes import recipe

if TYPE_CHECKING:
    from nomatmul.train.teacher_files import TeacherFiles

TOP = 64
"""Likeliest tokens of the teacher that a cache keeps where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class DistillArgs(TrainArgs):
    """teacher: a directory or a name on the Hub; share, temperature: see `TrainConfig`.

    cache: directory of what the teacher says; top: likeliest tokens kept there, by default TOP.
    """

    teacher: str = ""
    share: float = 0.5
    temperature: float = 1.0
    cache: str | None = None
    top: int | None = None

    def config(self) -> TrainConfig:
        """As `TrainArgs.config`; the vocabulary is that of the teacher's tokenizer.

        Raises ValueError or OSError, for the teacher too.
        """
        config = recipe(self.recipe)
        if not config.model.causal:
            raise ValueError(
                f"recipe {self.recipe} trains an encoder: a teacher's tokens are predicted from "
                "left to right, so its student is a causal recipe (`nomatmul recipes`)"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} must be above 0 and at most 1")
        if self.top is not None and (self.cache is None or self.top < 1):
            raise ValueError(f"top {self.top} must be at least 1, and needs a cache")
        require_train("distilling")
        from nomatmul.train.teacher_files import find_teacher

        return apply_overrides(
            config,
            [
                f"model.vocab_size={find_teacher(self.teacher).entries}",
                f"teacher_share={self.share}",
                f"temperature={self.temperature}",
                f"teacher_top={0 if self.cache is None else self.top or TOP}",
                *self.overrides(),
            ],
        )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `run`."""
        fields = ("share", "temperature", "top")
        return {name: value for name, value in super().options().items() if name not in fields}


def check_student(
    config: TrainConfig, teacher: TeacherFiles | None, cache: str | None = None
) -> None:
    """Raise ValueError where the run of `config` cannot be taught by `teacher`, if there is one.

    cache: where what the teacher says is kept.
    """
    from nomatmul.formats.architecture import architecture_of
    from nomatmul.models.layers import is_plain

    if (config.teacher_top > 0) != (cache is not None):
        raise ValueError(
            f"teacher_top {config.teacher_top} needs a cache: name its directory"
            if cache is None
            else f"cache {cache} needs teacher_top, the number of tokens that it keeps"
        )
    if teacher is None:
        if cache is not None:
            raise ValueError(f"cache {cache} needs a teacher: name one")
        if config.teacher_share:
            raise ValueError(f"teacher_share {config.teacher_share} needs a teacher: name one")
        return
    if not config.teacher_share:
        raise ValueError(f"teacher {teacher.path} has teacher_share 0: it would teach nothing")
    model, size = config.model, teacher.size
    if not model.causal:
        raise ValueError("an encoder has no teacher: only causal models are distilled")
    head = architecture_of(model).head
    if head.kind != "dense" and not is_plain(head):
        raise ValueError(
            "a student's head is dense, or ternary with one scale and a norm in front: "
            "set model.head_linear=dense"
        )
    if size.limit is not None and config.sequence_length > size.limit:
        raise ValueError(
            f"sequence_length {config.sequence_length} is above the {size.limit} tokens that "
            f"teacher {teacher.path} reads at once"
        )
    if not teacher.entries <= model.vocab_size <= size.rows:
        raise ValueError(
            f"model.vocab_size {model.vocab_size} does not fit teacher {teacher.path}: its "
            f"tokenizer has {teacher.entries} entries, its head {size.rows} rows"
        )
