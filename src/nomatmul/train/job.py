"""One training job from start to end: checks, data, model, resume, loop, export."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import torch
from torch import nn

from nomatmul.formats.files.directory import new_directory, write_json
from nomatmul.formats.runs import MODEL_STEP_FILE
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
from nomatmul.train.curve import draw_curve
from nomatmul.train.memory import MemoryPlan, plan_memory
from nomatmul.train.metrics import Console, read_metrics
from nomatmul.train.micro_step import wants_graph
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_optimizer, set_deterministic
from nomatmul.train.parallelize import shard_model
from nomatmul.train.prepare import (
    DataArgs,
    Prepared,
    build,
    check_inputs,
    open_built,
    with_token_ids,
)
from nomatmul.train.ranks import OtherRankError, Ranks, open_ranks
from nomatmul.train.run_directory import check_out, refuse_differences, write_run_file
from nomatmul.train.signals import Stopped, StopSignals
from nomatmul.train.states import gather_weights
from nomatmul.train.threads import limit_threads
from nomatmul.train.trainer import Trainer

_ECHO = 5.0  # seconds in which torchrun may send Ctrl-C a second time


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended. status: "finished", "stopped" (SIGTERM) or "interrupted" (Ctrl-C).

    model: the exported model's directory once finished. valid_loss in nats a token (of an encoder a
    hidden token).
    """

    status: str
    step: int
    elapsed: float
    model: str | None = None
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None
    valid_accuracy: float | None = None  # of an encoder
    curve: str | None = None  # picture of the losses, where matplotlib is installed


def run(
    config: TrainConfig,
    data: list[str],
    out: str | Path,
    *,
    valid: list[str] | None = None,
    tokenizer: str | None = None,
    text_field: str = "text",
    document_start: str | None = None,
    drop_document_start: bool = False,
    tokens: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    resume: str = "auto",
    override_config: bool = False,
    force: bool = False,
    quiet: bool = False,
    collective_timeout: float = 600.0,
) -> RunResult:
    """Train a model on `data` into the directory `out`, or continue what lies there.

    resume: "auto" continues from the newest good checkpoint, "never" refuses a directory that has
    one. override_config: continue although options that decide the result differ (never the
    model's). force: try it although memory is surely too small. device: "auto", "cpu", "cuda",
    ... The other arguments are those of `DataArgs`.

    In processes that torchrun started each one calls this, and they train one model together.
    collective_timeout: seconds after which a process that does not answer is given up.

    Raises ValueError or OSError for bad input before any work is done, CheckpointError when the
    disk is full or all checkpoints are damaged, NonFiniteError when the loss is NaN,
    OutOfMemoryError with advice, LostRankError when another process is gone, OtherRankError when
    another process has failed and said why.
    """
    if resume not in ("auto", "never"):
        raise ValueError(f"resume {resume!r}: choose auto or never")
    limit_threads()
    ranks, device = open_ranks(device, collective_timeout)
    args = DataArgs(
        tuple(data),
        tuple(valid or ()),
        tokenizer,
        text_field,
        document_start,
        tokens,
        workers,
        drop_document_start,
    )
    job = _Job(config, args, Path(out), ranks, Console(quiet, silent=not ranks.first))
    try:
        result = job.run(pick_device(device), resume, override_config, force)
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.close()
    return result


@dataclasses.dataclass
class _Job:
    """One run at one rank."""

    config: TrainConfig
    args: DataArgs
    out: Path
    ranks: Ranks
    console: Console

    def run(
        self, device: torch.device, resume: str, override: bool, force: bool = False
    ) -> RunResult:
        check_ranks(self.config, self.ranks.size)
        wants_graph(self.config, device, self.ranks.many)  # refuses one that is impossible
        plan = plan_memory(self.config, device, self.ranks, force)
        step = 0
        with StopSignals(_ECHO if self.ranks.many else 0.0) as signals:
            self.ranks.watch_signals(lambda: signals.requested is not None)
            try:
                built = self.ranks.on_first(
                    "preparing the data", lambda: self._build(resume, override)
                )
                prepared = open_built(self.config, built)
                self.config = dataclasses.replace(
                    self.config, model=with_token_ids(self.config.model, prepared.tokenizer)
                )
                with plan.advising():
                    trainer = self._set_up(prepared, device, plan, signals, override)
                    step = trainer.step
                    signals.deferred = True
                    finished = trainer.run()
            except Stopped as stop:
                self.ranks.fail(stop)
                return RunResult(_status(stop.number), step, 0.0)
            elapsed = trainer.clock.elapsed()
            if not finished:
                return RunResult(_status(trainer.stopped_by), trainer.step, elapsed)
            model = self._export(trainer)
        scored, curve = [], None
        if self.ranks.first:
            curve = draw_curve(self.out)
            scored = [row for row in read_metrics(self.out) if "valid_loss" in row]
        last: dict[str, float] = scored[-1] if scored else {}
        return RunResult(
            "finished",
            trainer.step,
            elapsed,
            str(model),
            last.get("valid_loss"),
            last.get("valid_bits_per_byte"),
            last.get("valid_accuracy"),
            None if curve is None else str(curve),
        )

    def _build(self, resume: str, override: bool) -> dict[str, list[str]]:
        checked = check_inputs(self.config, self.args)
        known = check_out(self.out, self.config, resume, override)
        return build(self.config, checked, self.out, self.console.preparing, known)

    def _set_up(
        self,
        prepared: Prepared,
        device: torch.device,
        plan: MemoryPlan,
        signals: StopSignals,
        override: bool,
    ) -> Trainer:
        """Model, optimiser and trainer in the state of the newest good checkpoint, if any."""
        config, ranks = self.config, self.ranks
        # Data that is too short is found before work.
        WindowOrder(len(prepared.train), config.sequence_length, config.seed)
        ranks.on_first(
            "writing run.json",
            lambda: write_run_file(self.out, config, prepared, override, ranks.size),
        )
        set_deterministic(config, device)
        torch.manual_seed(config.seed)
        ranks.begin("making the model")
        model = build_model(config.model)
        model.set_recompute(plan.recompute)
        if ranks.many:
            shard_model(model, device, ranks.size)
        else:
            model.to(device)
        optimizer = build_optimizer(model, config)
        checkpoints = Checkpoints(self.out, config.checkpoint_keep, ranks)
        progress = self._resume(checkpoints, model, optimizer, override)
        self.console.say(_summary(config, prepared, model, device, ranks))
        ranks.begin("starting")
        return Trainer(
            config,
            model,
            optimizer,
            prepared.tokenizer,
            prepared.train,
            prepared.valid,
            self.out,
            device,
            progress,
            console=self.console,
            checkpoints=checkpoints,
            stop_requested=lambda: signals.requested or 0,
            ranks=ranks,
        )

    def _resume(
        self,
        checkpoints: Checkpoints,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        override: bool,
    ) -> Progress:
        def find() -> str | None:
            found = checkpoints.newest_good(self.console.warn)
            return None if found is None else str(found)

        name = self.ranks.on_first("checking the checkpoints", find)
        if name is None:
            return Progress()
        path = Path(name)
        try:
            old, progress = read_state(path)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        refuse_differences(self.out, differences(old, self.config), override)
        self.ranks.begin(f"loading {path.name}")
        with self.ranks.speaking():
            restore(path, model, optimizer, self.ranks)
        self.console.say(f"continuing from {path.name}")
        return progress

    def _export(self, trainer: Trainer) -> Path:
        """OUT/model: the trained model alone."""
        path = self.out / "model"
        self.ranks.begin("exporting the model")
        weights = gather_weights(trainer.model, self.ranks) if self.ranks.many else None

        def write() -> None:
            with new_directory(path) as temporary:
                write_model(trainer.model, trainer.tokenizer, temporary, weights)
                write_json(temporary / MODEL_STEP_FILE, {"step": trainer.step})

        try:
            self.ranks.on_first("exporting the model", write)
        except OtherRankError:
            raise
        except Exception as error:  # full disk: torch, safetensors and OSError have no common base
            raise CheckpointError(
                f"cannot write {path}: {error}; the last checkpoint is intact"
            ) from error
        return path


def check_ranks(config: TrainConfig, ranks: int) -> None:
    """Raises ValueError when the batch cannot be cut into equal micro-batches for all ranks."""
    micro, batch = config.micro_batch_size, config.batch_size
    if batch % (ranks * micro) == 0:
        return
    fitting = [m for m in range(1, micro + 1) if batch % (ranks * m) == 0]
    advice = (
        f"--set micro_batch_size={fitting[-1]}"
        if fitting
        else f"--set batch_size={-(-batch // ranks) * ranks}"
    )
    raise ValueError(
        f"batch_size {batch} must be a multiple of ranks x micro_batch_size ({ranks} x {micro}): "
        f"try {advice}"
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


def _summary(
    config: TrainConfig, prepared: Prepared, model: nn.Module, device: torch.device, ranks: Ranks
) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    held = f", {len(prepared.valid):,} held out" if prepared.valid is not None else ""
    epochs = config.steps * config.tokens_per_step / len(prepared.train)
    length = (
        f"{config.time_limit:g} seconds"
        if config.time_limit > 0
        else f"{config.steps:,} steps ({epochs:.2f} epochs)"
    )
    where = f"{ranks.size} x {device.type}" if ranks.many else str(device)
    return (
        f"{config.recipe}: {count:,} parameters on {where}; {len(prepared.train):,} tokens{held}; "
        f"{config.tokens_per_step:,} tokens a step, {length}"
    )
