"""What the command `nomatmul train` is given; the standard library is enough to import this."""

from __future__ import annotations

import dataclasses
import os


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


def started_by_torchrun() -> bool:
    """Whether torchrun (or a launcher like it) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1
