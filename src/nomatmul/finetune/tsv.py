"""Tab-separated rows of a task, checked one by one: errors name the file and the line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

from nomatmul.finetune.tasks import Task
from nomatmul.formats.files.texts import open_table

MAX_CLASSES = 1000
NO_GOLD_LABEL = "-"  # of the rows of MNLI on whose label the annotators did not agree


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts (one or two a row) and labels: class ids, or numbers of a regression.

    left_out: rows of the file that had no text or label to use (GLUE's own files only).
    """

    texts: list[tuple[str, ...]]
    labels: list[float]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, places: list[int]) -> Rows:
        return Rows([self.texts[i] for i in places], [self.labels[i] for i in places])


def read_rows(path: str | Path, task: Task) -> tuple[Rows, tuple[str, ...]]:
    """All rows of a file, and the task's class names (read off the rows where it has none).

    Nothing is quoted: a quotation mark is a character like others. Blank lines at the end are no
    rows. Some of GLUE's files are shipped with rows that lack columns, a text or the gold label
    ("-"): of GLUE's own tasks those are left out and counted. Raises ValueError naming file and
    line for such a row in a file of one's own and for a label that is not legal; naming the file
    for missing columns, or where most rows of a task of GLUE would be left out; OSError.
    """
    rows = _Reader(Path(path), task)
    texts: list[tuple[str, ...]] = []
    words: list[tuple[int, str]] = []
    left_out, fault = 0, ""
    for number, cells in rows:
        try:
            found = rows.texts(number, cells), rows.label_of(number, cells)
        except _NoRow as error:
            if not task.shipped:
                raise
            left_out, fault = left_out + 1, fault or str(error)
            continue
        texts.append(found[0])
        words.append((number, found[1]))
    if left_out > len(texts):
        raise ValueError(
            f"{path}: {left_out} of {left_out + len(texts)} rows are no rows of {task.name}"
            f" ({fault})"
        )
    if not texts:
        raise ValueError(f"{path} has no rows")
    if task.regression:
        numbers = [_number(path, number, word) for number, word in words]
        return Rows(texts, numbers, left_out), ()
    names = task.labels if task.labels is not None else _names(path, [word for _, word in words])
    ids = {name: float(place) for place, name in enumerate(names)}
    for number, word in words:
        if word not in ids:
            raise ValueError(
                f"{path}, line {number}: label {word!r} is not one of {', '.join(names)}"
            )
    return Rows(texts, [ids[word] for _, word in words], left_out), names


class _NoRow(ValueError):
    """A line that lacks what a row needs; names file and line."""


class _Reader:
    """Yields (line number, cells) of a file; knows where texts and label stand."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task
        self._lines = _lines(path)
        if task.has_header:
            header = next(self._lines, (1, ""))[1]
            if not header.strip():
                raise ValueError(f"{path}, line 1: no header line with the columns' names")
            names = header.split("\t")
            self.width = len(names)
            self.columns = tuple(self._find(names, str(name)) for name in task.texts)
            self.label = self._find(names, str(task.label))
        else:
            assert task.columns is not None
            self.width = task.columns
            self.columns = tuple(int(place) for place in task.texts)
            self.label = int(task.label)

    def _find(self, names: list[str], name: str) -> int:
        stripped = [text.strip() for text in names]
        if name not in stripped:
            if len(names) == 1 and "," in names[0]:
                raise ValueError(f"{self.path}: commas are not read, only tab-separated values")
            raise ValueError(
                f"{self.path} has no column {name!r}; its header names {', '.join(stripped)}"
            )
        return stripped.index(name)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        blank: list[int] = []  # lines that are no rows if nothing but such lines follows
        for number, line in self._lines:
            if not line.strip():
                blank.append(number)
                continue
            yield from ((n, [""]) for n in blank)
            blank.clear()
            yield number, line.split("\t")

    def cell(self, number: int, cells: list[str], place: int) -> str:
        if cells == [""]:
            raise _NoRow(f"{self.path}, line {number}: empty row")
        if len(cells) != self.width:
            raise _NoRow(f"{self.path}, line {number}: {len(cells)} columns, expected {self.width}")
        if not cells[place].strip():
            raise _NoRow(f"{self.path}, line {number}: column {place + 1} is empty")
        return cells[place]

    def texts(self, number: int, cells: list[str]) -> tuple[str, ...]:
        return tuple(self.cell(number, cells, place) for place in self.columns)

    def label_of(self, number: int, cells: list[str]) -> str:
        word = self.cell(number, cells, self.label).strip()
        if word == NO_GOLD_LABEL and self.task.shipped:
            raise _NoRow(f"{self.path}, line {number}: no gold label")
        return word


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1 on. Only line feeds end one: texts may hold U+2028."""
    with open_table(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8").rstrip("\n").rstrip("\r")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason})"
                ) from None


def _number(path: str | Path, number: int, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}, line {number}: label {word!r} is no number")
    return value


def _names(path: str | Path, words: list[str]) -> tuple[str, ...]:
    """Class names in order: by value where all are whole numbers, else by alphabet."""
    names = set(words)
    if len(names) < 2:
        raise ValueError(f"{path}: all rows have the label {words[0]!r}; nothing can be learnt")
    if len(names) > MAX_CLASSES:
        raise ValueError(
            f"{path} has {len(names)} different labels, the limit is {MAX_CLASSES}; "
            "is this a regression (--regression)?"
        )
    whole = all(re.fullmatch(r"-?\d+", name) for name in names)  # what int() reads
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else str))


def read_hub(task: Task, split: str) -> tuple[Rows, tuple[str, ...]]:
    """GLUE's rows from the Hugging Face hub. Raises ValueError where `datasets` is missing."""
    try:
        import datasets
    except ImportError:
        raise ValueError("--data hub needs the package datasets: pip install datasets") from None
    if task.labels is None:
        raise ValueError(f"{task.name} is no task of GLUE, so it is not on the hub")
    data = datasets.load_dataset("nyu-mll/glue", task.name, split=split)
    columns = task.hub_texts or tuple(str(name) for name in task.texts)
    texts = [tuple(str(row[name]) for name in columns) for row in data]
    labels = [float(row["label"]) for row in data]
    for number, label in enumerate(labels):
        if not task.regression and label not in range(len(task.labels)):
            raise ValueError(f"{task.name} {split}, row {number}: label {label:g} is out of range")
    return Rows(texts, labels), task.labels
