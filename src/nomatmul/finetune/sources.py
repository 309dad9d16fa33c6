"""Where a task's rows come from: GLUE's folders, a file of one's own, the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nomatmul.finetune.tasks import Task
from nomatmul.finetune.tsv import Rows, read_hub, read_rows
from nomatmul.train.pipes import is_pipe, refuse_repeated

HUB = "hub"
_HELD_OUT_SHARE = 10  # of a file without a held-out one every tenth row is held out


def load_rows(
    task: Task, data: str | Path, held_out: str | Path | None = None
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Training rows under "train", held-out ones under their files' names; and the classes."""
    if str(data) == HUB:
        parts = {split: read_hub(task, split) for split in task.hub_splits}
        names = next(iter(parts.values()))[1]
        found = {split: rows for split, (rows, _) in parts.items()}
        return {"train": found.pop(task.hub_splits[0]), **found}, names
    files = _files(task, Path(data), held_out)
    train, names = read_rows(files[0], task)
    known = dataclasses.replace(task, labels=names)
    rows = {"train": train}
    for file in files[1:]:
        name = "held_out" if file.stem == "train" else file.stem  # never over the training rows
        rows[name] = read_rows(file, known)[0]
    if len(rows) == 1:
        places = range(len(train))
        held = [i for i in places if i % _HELD_OUT_SHARE == _HELD_OUT_SHARE - 1]
        if not held:
            raise ValueError(
                f"{files[0]} has {len(train)} rows: too few to hold some out, give --valid"
            )
        rest = [i for i in places if i % _HELD_OUT_SHARE != _HELD_OUT_SHARE - 1]
        kept = dataclasses.replace(train.part(rest), left_out=train.left_out)
        rows = {"train": kept, "held_out": train.part(held)}
    return rows, names


def _files(task: Task, data: Path, held_out: str | Path | None) -> list[Path]:
    """The training file and the held-out ones. Raises ValueError naming what is missing."""
    names = [str(path) for path in (data, held_out) if path is not None]
    refuse_repeated(names)
    if data.is_file() or is_pipe(names[0]):
        return [data, *([Path(held_out)] if held_out else [])]
    if task.folder == ".":  # a file of one's own
        what = "is a directory, not a file" if data.is_dir() else "does not exist"
        raise ValueError(f"{data} {what}")
    folder = data / task.folder if (data / task.folder / task.files[0]).is_file() else data
    if not (folder / task.files[0]).is_file():
        raise ValueError(
            f"{data} has no {task.files[0]} and no {task.folder}/{task.files[0]}: "
            f"give the folder of {task.name}'s files, or --data hub"
        )
    if held_out:
        return [folder / task.files[0], Path(held_out)]
    files = [folder / name for name in task.files]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing: give another held-out file with --valid")
    return files
