"""Fine-tune an encoder to classify texts: tasks of GLUE, or your own file.

MODEL is a training run's directory, a model that `nomatmul train` or the authors of UltraFastBERT
have made, or a packed encoder; without it the encoder in the box learns the task. --task names GLUE
tasks (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli), whose files --data DIR holds as GLUE
ships them (DIR/SST-2/train.tsv, dev.tsv), or --data hub to fetch them with the package datasets. Or
it names a tab-separated file of your own, with a header line: one or two columns of text, and one
of labels (any words; numbers with --regression).

Each task is trained with several seeds: a fresh head, AdamW with rate 4e-5, batches of 16, 5 epochs
(CoLA 15), as the authors do. The median of the seeds counts; OUT/TASK gets report.json, a file a
seed, and model/, the best seed's. Ctrl-C and SIGTERM save; the same command goes on there, with the
same results.
Needs pip install "nomatmul[train]".
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table

if TYPE_CHECKING:
    from nomatmul.train.signals import Stopped

EXAMPLES = """
examples:
  nomatmul finetune --task reviews.tsv --out runs/reviews --learning-rate 2e-4
  nomatmul finetune runs/encoder --task sst2 --task cola --data glue --out runs/glue
  nomatmul finetune runs/encoder --task mrpc --data hub --out runs/glue --seeds 3
  nomatmul finetune runs/encoder --task reviews.tsv --valid reviews-dev.tsv --out runs/reviews
  nomatmul finetune runs/encoder --task pairs.tsv --text-column left --text-column right \\
      --label-column similarity --regression --out runs/pairs
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None,
        positional=True,
        metavar="MODEL",
        help="directory of the encoder (default: the one in the box)",
    )
    task: tuple[str, ...] = option(
        metavar="TASK", help="a task of GLUE, or a .tsv file; may be repeated"
    )
    out: str = option(metavar="DIR", help="directory of the results; finished seeds are kept")
    data: str | None = option(
        None, metavar="DIR", help="folder of GLUE's files, or hub (not for your own file)"
    )
    valid: str | None = option(
        None,
        metavar="FILE",
        help="held-out rows (default: the task's own; of your own file every tenth row)",
    )
    text_column: tuple[str, ...] = option(
        (), metavar="NAME", help="column of text, given once or twice (default: sentence)"
    )
    label_column: str | None = option(
        None, metavar="NAME", help="column of labels (default: label)"
    )
    regression: bool = option(False, help="labels are numbers to be predicted")
    seeds: int = option(5, metavar="N", help="how many seeds")
    epochs: int | None = option(None, metavar="N", help="epochs (default: 5, CoLA 15)")
    batch_size: int = option(16, metavar="N", help="rows a step")
    learning_rate: float = option(4e-5, metavar="RATE", help="peak rate, after 10% warm-up")
    weight_decay: float = option(0.0, metavar="W", help="decay of matrices")
    max_length: int = option(128, metavar="N", help="longer rows are cut to so many tokens")
    rows: int | None = option(None, metavar="N", help="use the first N training rows only")
    pooler: str | None = option(
        None,
        metavar="NAME",
        help="what the head reads: avg, zero_index ([CLS]), max (default: the model's)",
    )
    group_lengths: bool = option(
        False, help="batches of rows of like length: less padding, quicker on a CPU"
    )
    device: str = option("auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1")
    precision: str = option("auto", metavar="NAME", help="auto, float32, bfloat16")
    force: bool = option(False, help="train although memory seems too small")
    quiet: bool = option(False, help="no progress bar")
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.engine.loading import encoder_directory
    from nomatmul.finetune import FinetuneConfig, finetune
    from nomatmul.finetune.tasks import find_task
    from nomatmul.train.signals import Stopped

    config = FinetuneConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(FinetuneConfig)}
    )
    tasks = [
        find_task(name, options.text_column, options.label_column, regression=options.regression)
        for name in options.task
    ]
    if options.valid and len(tasks) > 1:
        raise ValueError("--valid is a file of one task: give one --task")
    reports: list[dict[str, Any]] = []
    for name, task in zip(options.task, tasks, strict=True):
        own = task.folder == "."
        if own == (options.data is not None):
            raise ValueError(
                f"{name} is your own file: leave --data out"
                if own
                else f"--task {name} needs --data: the folder of GLUE's files, or hub"
            )
        try:
            report = finetune(
                options.model or encoder_directory(None),
                task,
                name if own else options.data or "",
                options.out,
                config,
                held_out=options.valid,
                device=options.device,
                quiet=options.quiet or options.json,
                force=options.force,
            )
        except Stopped as stop:
            return _stopped(stop, task.name, reports, options)
        reports.append(dataclasses.asdict(report))
    _show(reports, options.json)
    return 0


def _stopped(stop: Stopped, task: str, reports: list[dict[str, Any]], options: Options) -> int:
    """Say how to go on; the exit status, as `train` has it."""
    interrupted = stop.number == signal.SIGINT
    status = "interrupted" if interrupted else "stopped"
    if options.json:
        print_json({"status": status, "tasks": reports})
    print(
        f"{status} in {task}, saved in {options.out}; the same command goes on there",
        file=sys.stderr,
    )
    return 130 if interrupted else 0


def _show(reports: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"status": "finished", "tasks": reports})
        return
    table = [
        (
            report["task"],
            report["metric"],
            f"{100 * report['median']:.1f}",
            f"{100 * report['low']:.1f} to {100 * report['high']:.1f}",
            str(len(report["seeds"])),
        )
        for report in reports
    ]
    print_table(table, header=("task", "metric", "median", "from to", "seeds"))
    if len(reports) > 1:
        print(f"mean of the medians: {100 * sum(r['median'] for r in reports) / len(reports):.1f}")
    for report in reports:
        print(f"best model of {report['task']}: {report['model']}", file=sys.stderr)
        print(f"  next: nomatmul pack {report['model']} packed/{report['task']}", file=sys.stderr)
