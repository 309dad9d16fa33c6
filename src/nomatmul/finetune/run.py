"""Fine-tuning a model on a task with several seeds: data, seeds, median, report, best model.

OUT/TASK gets seed-N.json as each seed ends, report.json, and model/, the best seed's model as a
directory that `from_pretrained` and `nomatmul pack` read. The same command goes on after the last
finished seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nomatmul.finetune.checkpoint import SeedCheckpoint
from nomatmul.finetune.config import FinetuneConfig, check_memory
from nomatmul.finetune.data import Encoded, encode
from nomatmul.finetune.loop import Report, Settings, train_seed, words_of
from nomatmul.finetune.results import SeedResult, data_digest, read_result
from nomatmul.finetune.sources import load_rows
from nomatmul.finetune.tasks import Task
from nomatmul.finetune.tsv import Rows
from nomatmul.formats.files.directory import new_directory, write_json
from nomatmul.formats.runs import find_checkpoint
from nomatmul.models.classifiers import EncoderForSequenceClassification
from nomatmul.train.manifest import model_sha256
from nomatmul.train.metrics import Console, duration
from nomatmul.train.model import no_progress_bars, write_model
from nomatmul.train.plan import DevicePlan, pick_device, plan_device
from nomatmul.train.signals import Stopped, StopSignals
from nomatmul.train.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """What a task gave. median, low, high: of `metric` over the seeds, on the first held-out file.

    medians: of every metric on every held-out file. model: directory of the best seed's model.
    """

    task: str
    metric: str
    median: float
    low: float
    high: float
    medians: dict[str, dict[str, float]]
    seeds: list[dict[str, Any]]
    best_seed: int
    model: str
    settings: dict[str, Any]
    data: dict[str, Any]


def finetune(
    model: str | Path,
    task: Task,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig | None = None,
    *,
    held_out: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    force: bool = False,
) -> TaskReport:
    """Fine-tune the encoder in directory `model` (or a training run's) into OUT/TASK.

    data: GLUE's folder, the task's own folder in it, a TSV file, or "hub". held_out: a TSV file to
    score on, in place of the task's. Raises ValueError or OSError for bad input before any work,
    ValueError for a directory with results of other settings, OutOfMemoryError (force: not then)
    for a model that memory cannot hold, RuntimeError for a loss that is not finite. Ctrl-C and
    SIGTERM save where the seed stands and raise `train.signals.Stopped`; the same call goes on.
    """
    config, console = config or FinetuneConfig(), Console(quiet)
    plan = plan_device(pick_device(device), config.precision)
    plan.set_up()
    source = find_checkpoint(Path(model))
    rows, names = load_rows(task, data, held_out)
    for part, found in rows.items():
        if found.left_out:
            console.log(f"{part}: {found.left_out:,} rows without a text or a label left out")
    if not force:
        check_memory(source, config, plan)
    with StopSignals() as signals:
        work = _Work(source, task, config, Path(out) / task.name, plan, console, names, signals)
        return work.run(rows)


@dataclasses.dataclass
class _Work:
    """One task's seeds in one directory."""

    source: Path
    task: Task
    config: FinetuneConfig
    out: Path
    plan: DevicePlan
    console: Console
    names: tuple[str, ...]
    signals: StopSignals
    began: float = 0.0  # when training began in this start
    trained: float = 0.0  # seeds trained since then, the present one's share included

    def run(self, rows: dict[str, Rows]) -> TaskReport:
        if self.config.rows is not None:
            rows["train"] = rows["train"].part(
                list(range(min(self.config.rows, len(rows["train"]))))
            )
        first = self._model(0)  # a model that does not load is found before the data is encoded
        tokenizer = load_tokenizer(self.source)
        length = min(self.config.max_length, first.config.max_position_embeddings)
        # as the engine will read texts: see `engine.encoder_text`
        template = first.config.eos_token_id is None
        data = {
            name: encode(
                part, tokenizer, length, self.task.regression, self.plan.device, template=template
            )
            for name, part in rows.items()
        }
        data["train"] = dataclasses.replace(data["train"], grouped=self.config.group_lengths)
        self._check_vocabulary(first, data)
        facts = self._facts(data, length)
        settings = self.config.settings(self.task)
        described = dataclasses.asdict(settings) | {
            "bfloat16": self.plan.bfloat16,
            "task": self.task.name,
            "max_length": length,
            "pooler": first.config.pooler,
            "model": model_sha256(self.source),
            "data": data_digest(data),
        }
        if self.config.group_lengths:  # left out otherwise: results without the option stay theirs
            described["group_lengths"] = True
        self._notice(data, length)
        results: list[SeedResult] = []
        for seed in range(self.config.seeds):
            results.append(self._seed(seed, described, settings, data, results, tokenizer))
        return self._report(results, described, facts)

    def _model(self, seed: int) -> Any:
        """The encoder with a head drawn from the seed, on the device."""
        torch.manual_seed(seed)
        options: dict[str, Any] = {"num_labels": max(len(self.names), 1)}
        if self.task.regression:
            options["problem_type"] = "regression"
        else:
            options["id2label"] = dict(enumerate(self.names))
            options["label2id"] = {name: i for i, name in enumerate(self.names)}
        if self.config.pooler is not None:
            options["pooler"] = self.config.pooler
        with _quiet_transformers():
            model = EncoderForSequenceClassification.from_pretrained(self.source, **options)
        return model.to(self.plan.device)

    def _check_vocabulary(self, model: Any, data: dict[str, Encoded]) -> None:
        top = max(int(part.ids.max()) for part in data.values())
        if top >= model.config.vocab_size:
            raise ValueError(
                f"{self.source}: its tokenizer gives token {top}, the model's vocabulary is "
                f"{model.config.vocab_size}"
            )

    def _facts(self, data: dict[str, Encoded], length: int) -> dict[str, Any]:
        return {
            name: {"rows": len(part), "truncated": part.truncated, "max_length": length}
            for name, part in data.items()
        } | {"labels": list(self.names)}

    def _notice(self, data: dict[str, Encoded], length: int) -> None:
        for name, part in data.items():
            if part.truncated:
                self.console.warn(
                    f"{self.task.name}, {name}: {part.truncated} of {len(part)} rows are longer "
                    f"than {length} tokens and were cut"
                )

    def _seed(
        self,
        seed: int,
        described: dict[str, Any],
        settings: Settings,
        data: dict[str, Encoded],
        before: list[SeedResult],
        tokenizer: Any,
    ) -> SeedResult:
        """The result of a seed: from its file if an earlier start has finished it."""
        file = self.out / f"seed-{seed}.json"
        if file.is_file():
            return read_result(file, described)
        model = self._model(seed)
        title = f"{self.task.name} seed {seed}"
        held = {name: part for name, part in data.items() if name != "train"}
        checkpoint = SeedCheckpoint(
            self.out / f"seed-{seed}-checkpoint",
            described,
            tokenizer,
            lambda: self.signals.requested or 0,
        )
        self.console.start(self.task.name)
        self.signals.deferred = True
        try:
            result = train_seed(
                model, self.task, data["train"], held, settings, seed, self.plan,
                self._progress(seed, title), checkpoint,
            )  # fmt: skip
        finally:
            self.signals.deferred = False
            self.console.stop()
        self.console.log(f"{title}: {words_of(result.history[-1])}, {result.seconds:.0f} s")
        if all(self._main(result) > self._main(other) for other in before):
            self._save(model, tokenizer)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": described, **dataclasses.asdict(result)})
        checkpoint.remove()
        if self.signals.requested:  # it came in the seed's last moments
            raise Stopped(self.signals.requested)
        return result

    def _progress(self, seed: int, title: str) -> Report:
        """Shows how far all seeds together are, and the time that they still take."""
        seeds = self.config.seeds
        later = sum(not (self.out / f"seed-{n}.json").is_file() for n in range(seed + 1, seeds))
        began = self.began = self.began or time.monotonic()
        before, first = self.trained, -1.0

        def progress(share: float, words: str) -> None:
            nonlocal first
            first = share if first < 0 else first  # where a resumed seed goes on
            self.trained = before + share - first
            left = ""
            if self.trained > 0:
                rest = (time.monotonic() - began) * (1 - share + later) / self.trained
                left = f"  {duration(rest)} left for {1 + later} seeds"
            self.console.progress(1 - (1 - share + later) / seeds, f"{title}  {words}{left}")

        return progress

    def _main(self, result: SeedResult) -> float:
        return next(iter(result.scores.values()))[self.task.metrics[0]]

    def _save(self, model: Any, tokenizer: Any) -> None:
        with new_directory(self.out / "model") as temporary:
            write_model(model, tokenizer, temporary)

    def _report(
        self, results: list[SeedResult], described: dict[str, Any], facts: dict[str, Any]
    ) -> TaskReport:
        main = [self._main(result) for result in results]
        medians = {
            name: {
                metric: statistics.median(result.scores[name][metric] for result in results)
                for metric in self.task.metrics
            }
            for name in results[0].scores
        }
        report = TaskReport(
            task=self.task.name,
            metric=self.task.metrics[0],
            median=statistics.median(main),
            low=min(main),
            high=max(main),
            medians=medians,
            seeds=[dataclasses.asdict(result) for result in results],
            best_seed=results[main.index(max(main))].seed,
            model=str(self.out / "model"),
            settings=described | {"device": str(self.plan.device), "torch": torch.__version__},
            data=facts,
        )
        write_json(self.out / "report.json", dataclasses.asdict(report))
        return report


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bar, and without its report that the head is new, which is meant so."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*drawn at random.*")
            yield
    finally:
        logging.set_verbosity(level)
