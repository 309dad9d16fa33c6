"""What the command `nomatmul train` is given; the standard library is enough to import this."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomatmul.train.config import TrainConfig

_DIRECT = ("steps", "time_limit", "seed")  # options of the command that are fields of the config


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Arguments of one training command. Field names are the flags, frozen by a test.

    recipe: name in recipes.RECIPES. data: text, JSONL or parquet files, saved data sets, hf:NAME,
    or token directories. out: the run's directory. set: "name=value" overrides of the recipe.
    start: directory of a run or model whose weights the run begins with.
    steps, time_limit (seconds), seed: the overrides that people need most; None keeps the recipe's.
    collective_timeout: seconds that a run of many processes waits for one that does not answer.
    """

    recipe: str
    data: tuple[str, ...]
    out: str
    valid: tuple[str, ...] = ()
    tokenizer: str | None = None
    start: str | None = None
    text_field: str = "text"
    document_start: str | None = None
    drop_document_start: bool = False
    tokens: str | None = None
    workers: int | None = None
    set: tuple[str, ...] = ()
    steps: int | None = None
    time_limit: float | None = None
    seed: int | None = None
    device: str = "auto"
    resume: str = "auto"
    override_config: bool = False
    force: bool = False
    quiet: bool = False
    json: bool = False
    collective_timeout: float = 600.0

    def config(self) -> TrainConfig:
        """The recipe with the command's overrides. Raises ValueError naming what is wrong."""
        from nomatmul.train.overrides import apply_overrides
        from nomatmul.train.recipes import recipe

        return apply_overrides(recipe(self.recipe), self.overrides())

    def overrides(self) -> list[str]:
        """All of the command's "name=value", the last one of a name counts."""
        names = [name for name in _DIRECT if getattr(self, name) is not None]
        return [*self.set, *(f"{name}={getattr(self, name)}" for name in names)]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `run`."""
        options = vars(self) | {"quiet": self.quiet or self.json, "valid": list(self.valid)}
        for name in ("recipe", "data", "out", "json", "set", *_DIRECT):
            options.pop(name)
        return options

    def finish(self, model: str) -> None:
        """What one of the run's processes does when `model` has been exported; here nothing."""


def started_by_torchrun() -> bool:
    """Whether torchrun (or a launcher like it) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1
