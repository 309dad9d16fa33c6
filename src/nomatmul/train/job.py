"""One training job from start to end: checks, data, model, resume, loop, export."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nomatmul.train.batches import WindowOrder
from nomatmul.train.checkpoints import (
    CheckpointError,
    Checkpoints,
    Progress,
    read_state,
    restore,
    write_model,
)
from nomatmul.train.config import TrainConfig, differences
from nomatmul.train.files import new_directory, remove_leftovers, write_json
from nomatmul.train.metrics import Console, read_metrics
from nomatmul.train.model import build_model, enable_activation_checkpointing
from nomatmul.train.optimizer import build_optimizer, set_deterministic
from nomatmul.train.prepare import DataArgs, Prepared, check_inputs, prepare, with_token_ids
from nomatmul.train.signals import Stopped, StopSignals
from nomatmul.train.trainer import Trainer

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended. status: "finished", "stopped" (SIGTERM) or "interrupted" (Ctrl-C).

    model: the exported model's directory once finished. valid_loss in nats a token.
    """

    status: str
    step: int
    elapsed: float
    model: str | None = None
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None


def run(
    config: TrainConfig,
    data: list[str],
    out: str | Path,
    *,
    valid: list[str] | None = None,
    tokenizer: str | None = None,
    text_field: str = "text",
    document_start: str | None = None,
    tokens: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    resume: str = "auto",
    override_config: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a model on `data` into the directory `out`, or continue what lies there.

    resume: "auto" continues from the newest good checkpoint, "never" refuses a directory that has
    one. override_config: continue although options that decide the result differ (never the
    model's). device: "auto", "cpu", "cuda", ... The other arguments are those of `DataArgs`.

    Raises ValueError or OSError for bad input before any work is done, CheckpointError when the
    disk is full or all checkpoints are damaged, NonFiniteError when the loss is NaN.
    """
    out = Path(out)
    console = Console(quiet)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume {resume!r}: choose auto or never")
    target = pick_device(device)
    args = DataArgs(
        tuple(data), tuple(valid or ()), tokenizer, text_field, document_start, tokens, workers
    )
    check_inputs(config, args)
    _check_out(out, config, resume, override_config)
    step = 0
    with StopSignals() as signals:
        try:
            prepared = prepare(config, args, out, console.preparing)
            config = dataclasses.replace(
                config, model=with_token_ids(config.model, prepared.tokenizer)
            )
            trainer = _set_up(config, prepared, out, target, console, signals, override_config)
            step = trainer.step
            signals.deferred = True
            finished = trainer.run()
        except Stopped as stop:
            return RunResult(_status(stop.number), step, 0.0)
        if not finished:
            assert signals.requested is not None
            return RunResult(_status(signals.requested), trainer.step, trainer.clock.elapsed())
        model = _export(trainer, out)
    scored = [row for row in read_metrics(out) if "valid_loss" in row]
    last: dict[str, float] = scored[-1] if scored else {}
    return RunResult(
        "finished",
        trainer.step,
        trainer.clock.elapsed(),
        str(model),
        last.get("valid_loss"),
        last.get("valid_bits_per_byte"),
    )


def pick_device(name: str) -> torch.device:
    """auto is CUDA where there is one. Raises ValueError for a device that is absent or unknown."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def _status(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "stopped"


def _check_out(out: Path, config: TrainConfig, resume: str, override: bool) -> None:
    """Refuse a directory that is not ours, or holds a run with another config."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory")
    file = out / "run.json"
    if not file.exists():
        foreign = [p.name for p in out.iterdir() if p.name != "tokens"] if out.exists() else []
        if foreign:
            raise ValueError(
                f"{out} holds {foreign[0]!r} and is no training run: choose an empty directory"
            )
        return
    if resume == "never":
        raise ValueError(f"{out} holds a training run: choose another directory or resume it")
    try:
        old = TrainConfig.from_dict(json.loads(file.read_text("utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or of another version: {error}") from None
    same_ids = dataclasses.replace(
        config.model, **{name: getattr(old.model, name) for name in _IDS}
    )
    found = differences(old, dataclasses.replace(config, model=same_ids))
    _refuse_differences(out, found, override)


def _refuse_differences(out: Path, found: list[str], override: bool) -> None:
    fixed = [text for text in found if text.startswith("model.")]
    if fixed or (found and not override):
        hint = "" if fixed else " (--override-config continues with the new values)"
        raise ValueError(
            f"{out} holds a run with another config: {'; '.join(fixed or found)}{hint}"
        )


def _set_up(
    config: TrainConfig,
    prepared: Prepared,
    out: Path,
    device: torch.device,
    console: Console,
    signals: StopSignals,
    override: bool,
) -> Trainer:
    """Model, optimiser and trainer in the state of the newest good checkpoint, if there is one."""
    WindowOrder(len(prepared.train), config.sequence_length, config.seed)  # too short: before work
    _write_run_file(out, config, prepared, override)
    set_deterministic(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    optimizer = build_optimizer(model, config)
    checkpoints = Checkpoints(out, config.checkpoint_keep)
    progress = _resume(out, config, checkpoints, model, optimizer, console, override)
    console.say(_summary(config, prepared, model, device))
    return Trainer(
        config,
        model,
        optimizer,
        prepared.tokenizer,
        prepared.train,
        prepared.valid,
        out,
        device,
        progress,
        console=console,
        checkpoints=checkpoints,
        stop_requested=lambda: signals.requested is not None,
    )


def _resume(
    out: Path,
    config: TrainConfig,
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    console: Console,
    override: bool,
) -> Progress:
    path = checkpoints.newest_good(console.warn)
    if path is None:
        return Progress()
    try:
        old, progress = read_state(path)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _refuse_differences(out, differences(old, config), override)
    restore(path, model, optimizer)
    console.say(f"continuing from {path.name}")
    return progress


def _write_run_file(out: Path, config: TrainConfig, prepared: Prepared, override: bool) -> None:
    """run.json: what this run is. On a resume the data must be what it was."""
    file = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    if file.exists():
        old = json.loads(file.read_text("utf-8"))
        if old.get("data") != prepared.sha256 and not override:
            raise ValueError(f"the data or the tokenizer of the run in {out} have changed")
    facts: dict[str, Any] = {
        "format": "nomatmul-run",
        "version": 1,
        "config": config.to_dict(),
        "data": prepared.sha256,
        "tokenizer_sha256": prepared.train.tokenizer_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(file, facts)


def _summary(
    config: TrainConfig, prepared: Prepared, model: nn.Module, device: torch.device
) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    held = f", {len(prepared.valid):,} held out" if prepared.valid is not None else ""
    epochs = config.steps * config.tokens_per_step / len(prepared.train)
    length = (
        f"{config.time_limit:g} seconds"
        if config.time_limit > 0
        else f"{config.steps:,} steps ({epochs:.2f} epochs)"
    )
    return (
        f"{config.recipe}: {count:,} parameters on {device}; {len(prepared.train):,} tokens{held}; "
        f"{config.tokens_per_step:,} tokens a step, {length}"
    )


def _export(trainer: Trainer, out: Path) -> Path:
    """OUT/model: the trained model alone."""
    path = out / "model"
    try:
        with new_directory(path) as temporary:
            write_model(trainer.model, trainer.tokenizer, temporary)
    except Exception as error:  # full disk: torch, safetensors and OSError have no common base
        raise CheckpointError(
            f"cannot write {path}: {error}; the last checkpoint is intact"
        ) from error
    return path
