"""One training job from start to end: checks, data, model, resume, loop, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nomatmul.train.batches import WindowOrder
from nomatmul.train.checkpoints import (
    CheckpointError,
    Checkpoints,
    Progress,
    export_model,
    read_state,
    restore,
)
from nomatmul.train.config import TrainConfig, differences
from nomatmul.train.distill import check_student
from nomatmul.train.fff_training import choose_implementation
from nomatmul.train.inputs import DataArgs, check_inputs
from nomatmul.train.memory import plan_memory
from nomatmul.train.metrics import Console
from nomatmul.train.model import TrainedModel, build_model
from nomatmul.train.optimizer import build_optimizer
from nomatmul.train.parallelize import shard_model
from nomatmul.train.plan import DevicePlan, pick_device, plan_training
from nomatmul.train.prepare import Prepared, build, open_built, with_token_ids
from nomatmul.train.ranks import Ranks, open_ranks
from nomatmul.train.result import RunResult, finished, stopped
from nomatmul.train.run_directory import check_out, refuse_differences, write_run_file
from nomatmul.train.shards import is_token_directory
from nomatmul.train.signals import Stopped, StopSignals
from nomatmul.train.start import Start
from nomatmul.train.summary import summary
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_cache import CachedTeacher, TeacherCache
from nomatmul.train.teacher_files import TeacherFiles, find_teacher
from nomatmul.train.trainer import Trainer

_ECHO = 5.0  # seconds in which torchrun may send Ctrl-C a second time


def run(
    config: TrainConfig,
    data: list[str],
    out: str | Path,
    *,
    valid: list[str] | None = None,
    tokenizer: str | None = None,
    start: str | None = None,
    teacher: str | None = None,
    cache: str | None = None,
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

    start: directory of a run or a model of equal shape (the vocabulary may be smaller) whose
    weights are the first ones; optimiser and step are new. Its tokenizer is that of the run, unless
    one is given that extends it.
    teacher: directory or name (hf:owner/name) of a causal language model whose distribution is
    mixed into the targets (`teacher_share`, `temperature`); its tokenizer is that of the run.
    cache: directory for what it says (`teacher_top` likeliest tokens), written where it is missing;
    then the teacher is not in memory while the student is trained.
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
    first = None
    if start is not None:
        first = Start.open(start, config.model)
        tokenizer = first.tokenizer_of(tokenizer, any(map(is_token_directory, data)))
    files = None if teacher is None else find_teacher(teacher)
    check_student(config, files, cache)
    if files is not None:
        tokenizer = files.tokenizer_of(tokenizer)
    ranks, name = open_ranks(device, collective_timeout)
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
    console = Console(quiet, silent=not ranks.first)
    job = _Job(config, args, Path(out), ranks, console, first, files, cache)
    try:
        result = job.run(pick_device(name), resume, override_config, force)
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
    start: Start | None
    files: TeacherFiles | None  # of the teacher
    cache: str | None = None
    teacher: Teacher | CachedTeacher | None = None

    def run(
        self, device: torch.device, resume: str, override: bool, force: bool = False
    ) -> RunResult:
        """Every step of a run, in order: checks, data, model, training, export."""
        config, ranks, step = self.config, self.ranks, 0
        check_ranks(config, ranks.size)
        plan = plan_training(config, device, ranks.many)
        size = None if self.files is None else self.files.size
        if size is not None and self.cache is not None:
            size = size.absent()
        memory = plan_memory(config, plan, ranks, force, size)
        plan.set_up()
        with StopSignals(_ECHO if ranks.many else 0.0) as signals:
            ranks.watch_signals(lambda: signals.requested is not None)
            try:
                with memory.advising():
                    self._open_teacher(plan)
                data = self._prepare(resume, override)
                with memory.advising():
                    self._open_cache(plan, data)
                    trainer = self._trainer(data, plan, memory.recompute, signals, override)
                    step = trainer.step
                    signals.deferred = True
                    at_end = trainer.run()
            except Stopped as stop:
                ranks.fail(stop)
                return stopped(stop.number, step, 0.0)
            elapsed = trainer.clock.elapsed()
            if not at_end:
                return stopped(trainer.stopped_by, trainer.step, elapsed)
            model = export_model(
                trainer.model, data.tokenizer, self.out, trainer.step, ranks, data.template
            )
        return finished(trainer.step, elapsed, model, self.out if ranks.first else None)

    def _open_teacher(self, plan: DevicePlan) -> None:
        """Before the data are read: whatever is wrong with it costs no work."""
        if self.files is not None and self.cache is None:
            self.ranks.begin("loading the teacher")
            self.teacher = Teacher.open(self.files, plan, self.config.model.vocab_size)

    def _open_cache(self, plan: DevicePlan, data: Prepared) -> None:
        """What the teacher says, from disk; what is missing there one process asks it first."""
        if self.files is None or self.cache is None:
            return
        files, config = self.files, self.config
        cache = TeacherCache.of(self.cache, config, files, data)

        def complete() -> None:
            if not (missing := cache.missing()):
                return
            with cache.filling():
                cache.check_disk(missing)
                teacher = Teacher.open(files, plan, config.model.vocab_size)
                cache.fill(teacher, data, config.micro_batch_size, missing, self.console.preparing)

        self.ranks.on_first("asking the teacher", complete)
        self.teacher = CachedTeacher(cache, files, plan.device)

    def _prepare(self, resume: str, override: bool) -> Prepared:
        """The data; the config gets its tokenizer's special ids."""
        config, out = self.config, self.out
        start, teacher = self.start, self.files

        def prepare() -> dict[str, list[str]]:
            checked = check_inputs(config, self.args)
            if start is not None:
                start.check_tokenizer(checked.tokenizer)
            known = check_out(out, config, resume, override, start, teacher)
            return build(config, checked, out, self.console.preparing, known)

        data = open_built(config, self.ranks.on_first("preparing the data", prepare))
        model = with_token_ids(config.model, data.tokenizer)
        self.config = config = dataclasses.replace(config, model=model)
        # Data that is too short is found before work.
        WindowOrder(len(data.train), config.sequence_length, config.seed)
        self.ranks.on_first(
            "writing run.json",
            lambda: write_run_file(out, config, data, override, self.ranks.size, start, teacher),
        )
        return data

    def _trainer(
        self, data: Prepared, plan: DevicePlan, recompute: str, signals: StopSignals, override: bool
    ) -> Trainer:
        """Model, optimiser and trainer in the state of the newest good checkpoint, if any."""
        config, ranks = self.config, self.ranks
        torch.manual_seed(config.seed)
        ranks.begin("making the model")
        model = build_model(config.model)
        if self.start is not None:
            self.start.load(model)
        choose_implementation(model, config.fff_implementation)
        model.set_recompute(recompute)
        if ranks.many:
            shard_model(model, plan.device, ranks.size)
        else:
            model.to(plan.device)  # type: ignore[arg-type]  # transformers hides torch's signature
        optimizer = build_optimizer(model, config, plan)
        checkpoints = Checkpoints(self.out, config.checkpoint_keep, ranks, data.template)
        progress = self._resume(checkpoints, model, optimizer, override)
        self.console.log(summary(config, data, model, plan.device, ranks, self.teacher))
        ranks.begin("starting")
        return Trainer(
            config,
            plan,
            model,
            optimizer,
            data,
            progress,
            out=self.out,
            console=self.console,
            checkpoints=checkpoints,
            ranks=ranks,
            stop_requested=lambda: signals.requested or 0,
            teacher=self.teacher,
        )

    def _resume(
        self,
        checkpoints: Checkpoints,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        override: bool,
    ) -> Progress:
        path = checkpoints.newest_good(self.console.warn)
        if path is None:
            return Progress()
        try:
            old, progress = read_state(path)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        refuse_differences(self.out, differences(old, self.config), override)
        self.ranks.begin(f"loading {path.name}")
        with self.ranks.speaking():
            restore(path, model, optimizer, self.ranks)
        self.console.log(f"continuing from {path.name}")
        return progress


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
