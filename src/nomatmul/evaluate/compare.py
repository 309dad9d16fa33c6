"""The same model with other channel mixers, trained on the same tokens: does the layer pay?

`compare` prepares the data once, trains every variant with every seed (each run a row of
rows.jsonl, so that the same command goes on where it was stopped) and writes report.md, table.md,
summary.json and a plot. Names of variants: compare_variants.py.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_costs import TotalBar, about, check_memory, run_costs, sum_of
from nomatmul.evaluate.compare_plan import Cell, check_same_settings, make_cell, missing
from nomatmul.evaluate.compare_pool import PoolOptions, run_pool
from nomatmul.evaluate.compare_report import write_report
from nomatmul.evaluate.compare_variants import Variant, default_names, make_variant
from nomatmul.evaluate.rows import read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.directory import write_json
from nomatmul.train.config import TrainConfig
from nomatmul.train.metrics import Console, preparing_words
from nomatmul.train.prepare import (
    DataArgs,
    build,
    check_inputs,
    data_checksums,
    with_token_ids,
)
from nomatmul.train.tokenizer import load_tokenizer
from nomatmul.train.tokens import open_stream

Say = Callable[[str], None]
LOG = "runs.log"  # in OUT: what the training processes say


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What to compare. variants: names, () for the controls that suit the model's size.

    budget: tokens of each run. devices: "auto", or names separated by commas. seconds: of all, 0
    for no limit; what is not done then is left for the next start. implementation: of the trees.
    """

    config: TrainConfig
    data: tuple[str, ...]
    out: Path
    budget: int
    valid: tuple[str, ...] = ()
    tokenizer: str | None = None
    text_field: str = "text"
    document_start: str | None = None
    drop_document_start: bool = False
    variants: tuple[str, ...] = ()
    seeds: int = 2
    devices: str = "auto"
    lanes: int = 1
    seconds: float = 0.0
    eval_tokens: int = 500_000
    points: int = 8
    implementation: str = ""
    keep: bool = False
    threads: int = 0
    force: bool = False  # although memory seems too small


def plan(options: CompareOptions) -> list[Variant]:
    """The variants, checked. Raises ValueError naming what is wrong, before any work."""
    if options.seeds < 1:
        raise ValueError(f"seeds {options.seeds} must be at least 1")
    if options.points < 1 or options.eval_tokens < 1 or options.lanes < 1:
        raise ValueError("points, eval tokens and lanes must be at least 1")
    step = options.config.tokens_per_step
    if options.budget < step:
        raise ValueError(
            f"a budget of {options.budget} tokens is less than one step of "
            f"{options.config.batch_size} x {options.config.sequence_length} = {step}"
        )
    model = options.config.model
    names = options.variants or tuple(default_names(model))
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"variant {repeated[0]!r} is named twice")
    return [make_variant(model, name) for name in names]


def compare(
    options: CompareOptions, say: Say = lambda text: None, *, quiet: bool = False
) -> dict[str, Any]:
    """Prepare, train what is missing, report. Returns the summary, see `write_report`.

    say: gets the progress of preparing; quiet: no bar. What the training processes say is in
    OUT/runs.log.

    Raises ValueError, OSError or OutOfMemoryError for bad input; RuntimeError when no run could be
    made.
    """
    began = time.time()
    variants = plan(options)
    devices = pick_devices(options.devices)
    if not options.force:
        check_memory(options, variants, devices)
    train, valid = prepare_data(options, say)
    cells = make_cells(options, variants, train, valid)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.out / "rows.jsonl")
    check_same_settings(rows, cells, options.out)
    todo = missing(rows, cells)
    left = sum(len(cell.seeds) for cell in todo)
    total = sum(len(cell.seeds) for cell in cells)
    console = Console(quiet)
    costs = run_costs(todo, options.threads) if devices == ("cpu",) and not quiet else {}
    say(
        f"{len(variants)} variants x {options.seeds} seeds: {left} of {total} runs to make"
        + (f", {about(sum_of(todo, costs))} in all" if costs else "")
    )
    pool = PoolOptions(
        devices,
        lanes=options.lanes,
        ahead=1,
        deadline=began + options.seconds if options.seconds else 0.0,
        cache=options.out / "cache",
        threads=options.threads or 1,
    )
    failed: list[str] = []
    bar = TotalBar(console, todo, costs, options.out / "rows.jsonl")
    console.start(options.config.recipe)
    try:
        if todo:
            with open(options.out / LOG, "ab") as log:
                failed = run_pool(todo, pool, log, console.say, bar.tick)
    finally:
        console.stop()
    document = write_report(options.out, f"Channel mixers of {options.config.recipe}", _about())
    if failed and not any(document["sections"].values()):
        raise RuntimeError(f"no run has ended; {failed[0]} (its words are in {options.out / LOG})")
    undone = sum(len(cell.seeds) for cell in missing(read_rows(options.out / "rows.jsonl"), cells))
    return {
        "out": str(options.out),
        "report": str(options.out / "report.md"),
        "runs": total,
        "missing": undone,
        "failed": failed,
        "seconds": round(time.time() - began, 1),
        **document,
    }


def prepare_data(options: CompareOptions, say: Say) -> tuple[tuple[str, ...], dict[str, str]]:
    """Token directories of the training and the held-out text, built where they are missing."""
    if not options.valid:
        raise ValueError(
            "no held-out text: name one with --valid (variants are judged on text that none of "
            "them has seen)"
        )
    args = DataArgs(
        options.data,
        options.valid,
        options.tokenizer,
        options.text_field,
        options.document_start,
        drop_document_start=options.drop_document_start,
    )
    checked = check_inputs(options.config, args)

    def progress(what: str, done: int, of: int) -> None:
        say(preparing_words(what, done, of))

    options.out.mkdir(parents=True, exist_ok=True)
    facts = options.out / "data.json"
    begun = (options.out / "rows.jsonl").is_file() and facts.is_file()
    known = json.loads(facts.read_text("utf-8")) if begun else None
    built = build(options.config, checked, options.out, progress, known)
    found = data_checksums(built)
    if known not in (None, found):
        raise ValueError(f"the data of the runs in {options.out} have changed")
    write_json(facts, found)
    if len(built["valid"]) == 1:
        return tuple(built["train"]), {"valid": built["valid"][0]}
    return tuple(built["train"]), {f"valid{n}": path for n, path in enumerate(built["valid"])}


def make_cells(
    options: CompareOptions,
    variants: Sequence[Variant],
    train: tuple[str, ...],
    valid: dict[str, str],
) -> list[Cell]:
    """One cell a variant; seed numbers from 1. Raises ValueError when the data is too short."""
    config = options.config
    tokens = sum(len(open_stream(path)) for path in train)
    if tokens < 2 * config.sequence_length:
        raise ValueError(
            f"the data has {tokens} tokens, too few for sequences of {config.sequence_length}"
        )
    tokenizer = load_tokenizer(Path(train[0]))
    steps = options.budget // config.tokens_per_step
    warmup = min(config.warmup_steps, max(steps // 10, 1))
    config = dataclasses.replace(
        config,
        steps=steps,
        time_limit=0.0,
        batch_ramp=0.0,
        warmup_steps=warmup,
        micro_batch_size=config.batch_size,
        loss_chunks=1,
    )
    return [
        make_cell(
            config,
            dataclasses.replace(variant, model=_with_ids(variant.model, tokenizer)),
            section=config.recipe,
            seeds=tuple(range(1, 1 + options.seeds)),
            train=train,
            valid=valid,
            rows=str((options.out / "rows.jsonl").resolve()),
            eval_tokens=options.eval_tokens,
            eval_points=options.points,
            implementation=options.implementation,
            keep=str((options.out / "models").resolve()) if options.keep else "",
            commit=commit_name(),
        )
        for variant in variants
    ]


def _with_ids(model: ModelConfig, tokenizer: Any) -> ModelConfig:
    return with_token_ids(model, tokenizer)


def pick_devices(names: str) -> tuple[str, ...]:
    """auto: every GPU, else the CPU. Raises ValueError for a device that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if names == "auto":
        return tuple(f"cuda:{n}" for n in range(count)) or ("cpu",)
    devices = tuple(name.strip() for name in names.split(","))
    known = {"cpu", *(f"cuda:{n}" for n in range(count))} | ({"cuda"} if count else set())
    for device in devices:
        if device not in known:
            raise ValueError(f"device {device!r} is not here: choose of {', '.join(sorted(known))}")
    return devices


def commit_name() -> str:
    """Short name of the checked-out commit of this package, "unknown" outside of a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _about() -> str:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}, {commit_name()}."
