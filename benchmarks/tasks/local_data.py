"""Data of the local tasks: files in a directory that the user names, never the network.

The harness calls these functions with the task's metadata; `data` is the directory:

    --metadata '{"data": "DIR"}'            lm_eval.tasks.TaskManager(metadata={"data": "DIR"})
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

Rows = Iterable[dict[str, Any]]


def _split(rows: Rows) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(list(rows))}


def _file(data: str | None, name: str) -> Path:
    if data is None:
        raise ValueError(
            """local tasks need their data's directory: --metadata '{"data": "DIR"}'"""
        )
    return Path(data) / name


def _json_lines(path: Path) -> Rows:
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def rows(data: str | None = None, *, file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The lines of a file of JSON objects."""
    return _split(_json_lines(_file(data, file)))


def piqa(data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """piqa_valid.jsonl, with the labels of piqa_valid-labels.lst."""
    labels = _file(data, "piqa_valid-labels.lst").read_text().split()
    found = _json_lines(_file(data, "piqa_valid.jsonl"))
    return _split({**row, "gold": int(label)} for row, label in zip(found, labels, strict=True))


def hellaswag(data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """hellaswag_val_full.txt.bz2: six lines a task, (context, number of the right ending, four
    endings); marks of WikiHow are taken out as the harness's own task does."""
    with bz2.open(_file(data, "hellaswag_val_full.txt.bz2"), "rt", encoding="utf-8") as lines:
        text = [line.rstrip("\n") for line in lines]
    return _split(
        {
            "query": _plain(text[at]),
            "gold": int(text[at + 1]),
            "choices": [_plain(ending) for ending in text[at + 2 : at + 6]],
        }
        for at in range(0, len(text) - 5, 6)
    )


def _plain(text: str) -> str:
    text = re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
