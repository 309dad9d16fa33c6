"""Cells of a study, and the rows that their runs leave.

A cell is one variant of the model with all its seeds, as plain values that go to another process
as JSON. A run is one seed of a cell; it becomes one row of rows.jsonl when it ends, so that a
study which is stopped goes on where it was.

A library.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nomatmul.evaluate import compare as evaluate
from nomatmul.evaluate.variants import Variant, variant_config
from nomatmul.train.config import TrainConfig

# 8,192 byte pairs of Wikipedia and novels: that of the model which the package carried when the
# studies were made. The package's own changes with its model; tokens of a study must not.
BYTE_PAIRS = Path(__file__).with_name("tokenizer-8192.json")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one process is to train.

    section: the study it belongs to (its rows share tokens, texts and token mixer). config: a
    TrainConfig as a dict; steps, seed and learning rate are its own. train and valid: token
    directories, the held-out ones by name. eval_points: looks at the held-out text during a run.
    implementation: of the trees, ops: of everything else (NOMATMUL_OPS); "" leaves the choice to
    them. deadline: seconds since the epoch, 0 for none. expected_speed: tokens/s, to judge whether
    the first run can end before the deadline (0: not known). lanes: runs at a time on the device,
    for the row. keep: a directory for the trained models ("" keeps none).
    """

    section: str
    variant: str
    label: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    neurons: int
    active: int
    train: tuple[str, ...]
    valid: dict[str, str]
    rows: str
    eval_tokens: int = 2_000_000
    eval_points: int = 8
    device: str = "cpu"
    compile: str = "auto"
    implementation: str = ""
    ops: str = ""
    deadline: float = 0.0
    expected_speed: float = 0.0
    lanes: int = 1
    keep: str = ""
    stage: str = "final"
    commit: str = "unknown"

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig.from_dict(self.config)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cell:
        values = json.loads(text)
        for name in ("seeds", "train"):
            values[name] = tuple(values[name])
        return cls(**values)


def make_cell(base: TrainConfig, variant: Variant, **values: Any) -> Cell:
    """The cell of a variant: `base` with its model and its own training options."""
    return Cell(
        variant=variant.name,
        label=variant.label,
        neurons=variant.neurons,
        active=variant.active,
        config=variant_config(base, variant).to_dict(),
        **values,
    )


def identity(cell: Cell) -> str:
    """A short hash of all that decides the result of a seed, apart from seed and steps."""
    return evaluate.identity(cell.config, cell.train, list(cell.valid), cell.eval_tokens)


def find_row(rows: Iterable[dict[str, Any]], cell: Cell, seed: int) -> dict[str, Any] | None:
    """The row of this very run, if it has ended: cut runs do not count, diverged ones do."""
    wanted = (cell.section, cell.variant, cell.stage, seed, identity(cell), cell.config["steps"])
    for row in rows:
        keys = ("section", "variant", "stage", "seed", "identity", "steps_planned")
        if tuple(row.get(key) for key in keys) == wanted and row["status"] != "cut":
            return row
    return None


def missing(rows: list[dict[str, Any]], cells: Iterable[Cell]) -> list[Cell]:
    """The cells with the seeds that no row has yet; finished cells are left out."""
    todo = []
    for cell in cells:
        seeds = tuple(seed for seed in cell.seeds if find_row(rows, cell, seed) is None)
        if seeds:
            todo.append(dataclasses.replace(cell, seeds=seeds))
    return todo
