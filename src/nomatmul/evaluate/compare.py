"""A recipe and its controls, trained on the same tokens with the same seeds: does the layer pay?

A run is one variant with one seed, `nomatmul train`'s own run (compare_runs.py), and becomes a row
of OUT/rows.jsonl. The same command goes on where it was stopped, a run at its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_report import write_report
from nomatmul.evaluate.compare_runs import LOG, Run, TotalBar, about, run_costs, sum_of, train_all
from nomatmul.evaluate.flops import training_flops
from nomatmul.evaluate.rows import read_rows, renamed
from nomatmul.evaluate.variants import Variant, default_names, make_variant, variant_config
from nomatmul.formats.files.directory import write_json
from nomatmul.train.config import FREE_FIELDS, LATER_OPTIONS, RETIRED_OPTIONS, TrainConfig
from nomatmul.train.inputs import DataArgs, check_inputs
from nomatmul.train.metrics import Console, preparing_words
from nomatmul.train.prepare import build, open_built, with_token_ids
from nomatmul.train.tokenizer import load_tokenizer

Log = Callable[[str], None]
# Of a TrainConfig, what a run's identity leaves out: it has columns of its own, or decides nothing.
_NOT_IDENTITY = FREE_FIELDS | {"recipe", "seed", "steps"}


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What to compare. variants: names, () for the controls that suit the model's size.

    budget: tokens of each run. devices: "auto", or names separated by commas. time_limit: seconds
    of all; what is not done then is left for the next start. implementation: of the trees.
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
    time_limit: float | None = None
    eval_tokens: int = 500_000
    points: int = 8
    implementation: str | None = None
    keep: bool = False  # the trained models, in OUT/models
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
    options: CompareOptions, log: Log = lambda text: None, *, quiet: bool = False
) -> dict[str, Any]:
    """Prepare, train what is missing, report. Returns the summary, see `write_report`.

    log: gets the progress of preparing; quiet: no bar. Raises ValueError, OSError or
    OutOfMemoryError for bad input; RuntimeError when no run could be made.
    """
    began = time.time()
    variants, devices = plan(options), pick_devices(options.devices)
    if not options.force:
        check_memory(options, variants, devices)
    train, valid = prepare_data(options, log)
    runs, file = make_runs(options, variants, train, valid), options.out / "rows.jsonl"
    rows = read_rows(file)
    refuse_other_settings(rows, runs, options.out)
    if words := renamed(rows):
        log(words)
    todo = [run for run in runs if not run.ended(rows)]
    costs = run_costs(todo, options.threads) if devices == ("cpu",) and not quiet else {}
    log(
        f"{len(variants)} variants x {options.seeds} seeds: {len(todo)} of {len(runs)} runs to make"
        + (f", {about(sum_of(todo, costs))} in all" if costs else "")
    )
    console = Console(quiet)
    console.start(options.config.recipe)
    try:
        failed = train_all(
            todo,
            options.out,
            [name for name in devices for _ in range(1 if name == "cpu" else options.lanes)],
            deadline=began + options.time_limit if options.time_limit else None,
            threads=options.threads or 1,
            log=console.log,
            tick=TotalBar(console, todo, costs, file).tick,
        )
    finally:
        console.stop()
    document = write_report(options.out, f"Channel mixers of {options.config.recipe}", _about())
    if failed and not any(document["sections"].values()):
        raise RuntimeError(f"no run has ended; {failed[0]}; see {options.out / LOG}")
    rows = read_rows(file)
    return {
        "out": str(options.out),
        "report": str(options.out / "report.md"),
        "runs": len(runs),
        "missing": sum(not run.ended(rows) for run in runs),
        "failed": failed,
        "seconds": round(time.time() - began, 1),
        **document,
    }


def check_memory(
    options: CompareOptions, variants: Sequence[Variant], devices: Sequence[str]
) -> None:
    """Raises OutOfMemoryError naming the first variant that the device surely cannot hold."""
    import torch

    from nomatmul.train.memory import OutOfMemoryError, plan_memory
    from nomatmul.train.plan import plan_training
    from nomatmul.train.ranks import Ranks

    for variant in variants:
        try:
            config = variant_config(options.config, variant)
            plan_memory(config, plan_training(config, torch.device(devices[0])), Ranks.alone())
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{variant.name}: {error}") from None


def prepare_data(options: CompareOptions, log: Log) -> tuple[list[str], list[str]]:
    """Token directories of the training and the held-out text, built where they are missing."""
    if not options.valid:
        raise ValueError(
            "no held-out text: name one with --valid (variants are judged on text that none of "
            "them has seen)"
        )
    names = [f.name for f in dataclasses.fields(DataArgs) if hasattr(options, f.name)]
    args: Any = {name: getattr(options, name) for name in names}
    checked = check_inputs(options.config, DataArgs(**args))
    options.out.mkdir(parents=True, exist_ok=True)
    facts = options.out / "data.json"
    begun = (options.out / "rows.jsonl").is_file() and facts.is_file()
    known = json.loads(facts.read_text("utf-8")) if begun else None
    built = build(
        options.config, checked, options.out, lambda *args: log(preparing_words(*args)), known
    )
    found = open_built(options.config, built).sha256
    if known not in (None, found):
        raise ValueError(f"the data of the runs in {options.out} have changed")
    write_json(facts, found)
    return built["train"], built["valid"]


def make_runs(
    options: CompareOptions, variants: Sequence[Variant], train: list[str], valid: list[str]
) -> list[Run]:
    """All runs, a variant's seeds behind each other, numbered from 1."""
    tokenizer, out = load_tokenizer(Path(train[0])), options.out.resolve()
    base, runs = _run_config(options), []
    for variant in variants:
        config = variant_config(base, variant)
        config = dataclasses.replace(config, model=with_token_ids(config.model, tokenizer))
        row = _known_columns(config, variant, train, valid)
        for seed in range(1, 1 + options.seeds):
            name = f"{config.recipe}-{variant.name}-{seed}"
            run = Run(
                config=dataclasses.replace(config, seed=seed).to_dict(),
                train=train,
                valid=valid,
                directory=str(out / "runs" / f"{name}-{row['identity']}-{config.steps}"),
                keep=str(out / "models" / name) if options.keep else "",
                rows=str(out / "rows.jsonl"),
                row={**row, "seed": seed},
            )
            runs.append(run)
    return runs


def _run_config(options: CompareOptions) -> TrainConfig:
    """The recipe with the budget's steps, looks at the held-out text and nothing else beside."""
    config = options.config
    steps = options.budget // config.tokens_per_step
    return dataclasses.replace(
        config,
        steps=steps,
        time_limit=0.0,
        batch_ramp=0.0,
        warmup_steps=min(config.warmup_steps, max(steps // 10, 1)),
        log_interval=min(config.log_interval, max(steps // 20, 1)),
        eval_interval=-(-steps // options.points),
        eval_tokens=options.eval_tokens,
        sample_interval=0,
        diagnostics_interval=0,
        checkpoint_keep=1,
        fff_implementation=options.implementation or "",
    )


def _known_columns(
    config: TrainConfig, variant: Variant, train: Sequence[str], valid: Sequence[str]
) -> dict[str, Any]:
    predicted = 1.0 if config.model.causal else config.masked_tokens / config.sequence_length
    flops = [
        training_flops(config.model, config.sequence_length, predicted=predicted, masked=masked)
        for masked in (False, True)
    ]
    return {
        "section": config.recipe,
        "variant": variant.name,
        "label": variant.label,
        "stage": "final",
        "identity": identity(config.to_dict(), train, valid, config.eval_tokens),
        "learning_rate": config.learning_rate,
        "steps_planned": config.steps,
        "tokens_per_step": config.tokens_per_step,
        "parameters": config.model.param_count(),
        "neurons": variant.neurons,
        "active": variant.active,
        "flops_per_token": flops[0],
        "flops_masked_per_token": flops[1],
    }


def identity(
    config: dict[str, Any], train: Sequence[str], valid: Sequence[str], eval_tokens: int
) -> str:
    """A short hash of all that decides the result of a seed, apart from seed and steps."""
    # With the options that are gone and without those that came later, so that rows of older
    # runs are found.
    values = RETIRED_OPTIONS | {
        name: value
        for name, value in config.items()
        if name not in _NOT_IDENTITY and LATER_OPTIONS.get(name) != value
    }
    # Directories differ between machines, what lies in them does not: names only.
    facts = [
        values,
        [Path(path).name for path in train],
        sorted(Path(path).name for path in valid),
        eval_tokens,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def refuse_other_settings(rows: Sequence[dict[str, Any]], runs: Sequence[Run], out: Path) -> None:
    """Raise ValueError where a variant has runs with other settings: a table would mix them."""
    wanted = {(run.row["section"], run.row["variant"]): run.row["identity"] for run in runs}
    for row in rows:
        found = wanted.get((row["section"], row["variant"]))
        if found is not None and row.get("identity") not in (None, found):
            raise ValueError(
                f"{out} holds runs of {row['variant']!r} with other settings or other data; "
                "give the same ones again, or another --out"
            )


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


def _about() -> str:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}."
