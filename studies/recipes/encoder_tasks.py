"""An encoder's scores on tasks of GLUE: the rate chosen on held-out training rows, then the seeds.

The development set decides nothing, it is only scored. For the choice 1,000 rows (at most a tenth)
are drawn among the longest fifth of the training rows, and every row that is part of one of them
is left out: SST-2's rows are phrases of its sentences, and whoever has read a phrase knows the
sentence's label.

A library of encoder.py.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import nomatmul
from nomatmul.finetune.sources import load_rows
from nomatmul.finetune.tasks import TASKS
from nomatmul.formats.files.atomic import write_file
from studies.recipes.encoder_jobs import start, wait

_HELD, _SHARE, _LONG = 1000, 10, 5  # rows held out, at most a tenth, of the longest fifth


def held_part(glue: Path, name: str, rows: int, out: Path) -> None:
    """OUT/FOLDER/{train,dev}.tsv: `rows` training rows of a task, and rows held out of them."""
    task = TASKS[name]
    lines = (glue / task.folder / "train.tsv").read_text("utf-8").splitlines(keepends=True)
    head = lines[:1] if task.has_header else []
    texts = [text[0].strip() for text in load_rows(task, glue)[0]["train"].texts]
    lines = lines[len(head) :]
    assert len(lines) == len(texts), f"{glue / task.folder}: rows that are no rows"
    random = np.random.default_rng(0)
    longest = np.argsort([-len(text.split()) for text in texts], kind="stable")
    count = max(min(_HELD, len(texts) // _SHARE), 1)
    held = random.permutation(longest[: max(len(texts) // _LONG, count)])[:count]
    known = "\n".join(f" {texts[place]} " for place in held)
    rest = [i for i in random.permutation(len(texts)) if f" {texts[i]} " not in known]
    folder = out / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    for part, places in (("train", rest[:rows]), ("dev", held)):
        text = "".join([*head, *(lines[i].rstrip("\n") + "\n" for i in places)])
        write_file(folder / f"{part}.tsv", text.encode())


def task_scores(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """The rates on the held-out part, then all seeds at each variant's best one, --jobs at a time.

    A variant's own part of the answer has its scores on the development set and its best model.
    """
    part = args.work / "held-out"
    held_part(args.glue, task, args.search_rows, part)
    short = ["--data", part, "--epochs", args.search_epochs, "--seeds", 1]
    cells = [(name, rate) for rate in args.rates for name in args.variants]
    search = side_by_side(args, task, cells, "search", short)
    found: dict[str, Any] = {"task": task, "search": search}
    best = []
    for name in args.variants:
        mine = [row for row in search if row["variant"] == name and "median" in row]
        if mine:
            best.append((name, max(mine, key=lambda row: row["median"])["rate"]))
    for seeds in range(1, args.seeds + 1):  # all have their first seed before one's second
        long = ["--data", args.glue, "--epochs", args.epochs, "--seeds", seeds,
                "--precision", args.precision]  # fmt: skip
        for row in side_by_side(args, task, best, "all", long):
            if seeds == 1 or "median" in row:
                found[row["variant"]] = row
    return found


def side_by_side(
    args: argparse.Namespace, task: str, cells: list[tuple[str, float]], kind: str, words: list[Any]
) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(lambda cell: tuned(args, task, *cell, kind, words), cells))
    return [
        {"variant": name, "rate": rate, **report}
        for (name, rate), report in zip(cells, reports, strict=True)
    ]


def tuned(
    args: argparse.Namespace, task: str, name: str, rate: float, kind: str, words: list[Any]
) -> dict[str, Any]:
    """`nomatmul finetune` of a variant at one rate; goes on where it was, unless it is late."""
    cell = f"{task}-{kind}-{name}-{rate:g}"
    out, last = args.work / cell, args.began + args.seconds - 15
    if time.time() > last - args.least:
        return {"skipped": "no time"}
    command = ["finetune", args.work / name, "--task", task, "--out", out, *words,
               "--learning-rate", rate, "--batch-size", 32, "--max-length", 96,
               "--device", args.device, "--quiet"]  # fmt: skip
    if args.device == "cpu":  # a GPU's batches all have the longest row's shape
        command.append("--group-lengths")
    for ops in ("", "naive"):  # plain PyTorch where the kernels of trees do not serve
        try:
            wait({cell: start(args, cell, command, {"NOMATMUL_OPS": ops})}, last)
            break
        except SystemExit as error:
            failed = str(error)
    else:
        return {"failed": failed}
    report = json.loads((out / task / "report.json").read_text())
    scores = [next(iter(seed["scores"].values())) for seed in report["seeds"]]
    return {
        "median": report["median"], "scores": scores, "model": report["model"],
        "rows": report["data"]["train"]["rows"],
        **{key: report["settings"][key] for key in ("epochs", "bfloat16")},
        "seconds": [round(seed["seconds"], 1) for seed in report["seeds"]],
    }  # fmt: skip


def packed_accuracy(packed: Path, glue: Path, name: str) -> float:
    """Share of the development set's rows that the packed classifier in `packed` gets right."""
    rows, labels = load_rows(TASKS[name], glue)
    dev = rows[next(part for part in rows if part != "train")]
    model = nomatmul.load(packed, kind="encoder")
    texts = [text[0] for text in dev.texts]
    answers = [row["label"] for row in model.classify(texts, truncate=True)]
    wanted = [labels[int(label)] for label in dev.labels]
    return round(float(np.mean([a == b for a, b in zip(answers, wanted, strict=True)])), 4)
