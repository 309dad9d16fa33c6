"""The tasks of GLUE by name, and tasks of one's own: where texts and labels stand, what is scored.

GLUE's own files are meant: `train.tsv` and `dev.tsv` in a folder a task, tab-separated, unquoted.
Epochs and metrics are those of the UltraFastBERT authors' evaluation (arXiv 2311.10770).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nomatmul.train.pipes import is_pipe
from nomatmul.train.sources import suffix_of

EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    texts: one or two columns, by name, or by number in a file without a header line. label: the
    label's column. labels: the classes in the order of their ids; None for a task whose labels
    are read off the training rows; empty for a regression. columns: how many a file without a
    header line has. metrics: the first one decides. files: training and held-out file names in the
    task's folder; further ones are scored too, under their own names. hub_texts: GLUE's column
    names on the hub, where they differ.
    """

    name: str
    folder: str
    texts: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    epochs: int = EPOCHS
    columns: int | None = None
    files: tuple[str, ...] = ("train.tsv", "dev.tsv")
    hub_texts: tuple[str, ...] = ()
    hub_splits: tuple[str, ...] = ("train", "validation")

    @property
    def regression(self) -> bool:
        return self.labels == ()

    @property
    def shipped(self) -> bool:
        """Whether it is a task of GLUE, whose files are taken as they are shipped."""
        return self.folder != "."

    @property
    def has_header(self) -> bool:
        return self.columns is None


_BINARY = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (3,), 1, _BINARY, ("matthews", "accuracy"), epochs=15, columns=4,
             hub_texts=("sentence",)),
        Task("sst2", "SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("f1", "accuracy"),
             hub_texts=_PAIR),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", _BINARY,
             ("f1", "accuracy")),
        Task("stsb", "STS-B", _PAIR, "score", (), ("pearson", "spearman")),
        Task("mnli", "MNLI", _PAIR, "gold_label", _NLI, ("accuracy",),
             files=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),
             hub_texts=("premise", "hypothesis"),
             hub_splits=("train", "validation_matched", "validation_mismatched")),
        Task("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILED, ("accuracy",)),
        Task("rte", "RTE", _PAIR, "label", _ENTAILED, ("accuracy",)),
        Task("wnli", "WNLI", _PAIR, "label", _BINARY, ("accuracy",)),
    )
}  # fmt: skip


def find_task(
    name: str,
    texts: Sequence[str] = (),
    label: str | None = None,
    *,
    regression: bool = False,
) -> Task:
    """GLUE's task of this name ("SST-2" is "sst2"), or that of a TSV file with a header line.

    texts, label: columns of one's own file ("sentence" and "label" unless given). Raises
    ValueError for a name that is neither, naming the tasks.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key in TASKS:
        if texts or label or regression:
            raise ValueError(f"{name} is a task of GLUE: its columns are known, give none")
        return TASKS[key]
    path, suffix, once = Path(name), suffix_of(name), is_pipe(name)
    if suffix not in (".tsv", ".txt", ".csv") and not path.is_file() and not once:
        raise ValueError(
            f"unknown task {name!r}: name one of {', '.join(TASKS)}, or a file of your own (.tsv)"
        )
    if suffix == ".csv":
        raise ValueError(f"{name}: commas are not read, only tab-separated values (.tsv)")
    if len(texts) > 2:
        raise ValueError(f"{len(texts)} text columns ({', '.join(texts)}): give one or two")
    return Task(
        name="pipe" if once else path.stem,
        folder=".",
        texts=tuple(texts) or ("sentence",),
        label=label or "label",
        labels=() if regression else None,
        metrics=("pearson", "spearman") if regression else ("accuracy", "macro_f1"),
        files=(path.name,),
    )
