"""Checkpoints: written aside and renamed, checked when read, the last few kept.

OUT/checkpoints/step-00001000/ holds the model as `CausalLM.save_pretrained` writes it (config.json,
model.safetensors) with tokenizer.json, so `pack` and `from_pretrained` read it directly; the
optimiser (optimizer.safetensors, or `shards/` of many devices: states.py), the random states
(random.safetensors, or one for each rank), state.json (step, seconds spent, TrainConfig) and
manifest.json (size and SHA-256 of every file). OUT/checkpoints/latest names the newest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import new_directory, remove_leftovers, write_json
from nomatmul.formats.runs import MODEL_STEP_FILE
from nomatmul.models.base import TextModel
from nomatmul.train.config import TrainConfig
from nomatmul.train.manifest import describe_files, find_fault, write_manifest
from nomatmul.train.model import TrainedModel, write_model
from nomatmul.train.parallelize import local
from nomatmul.train.ranks import LostRankError, OtherRankError, Ranks
from nomatmul.train.states import (
    StateError,
    gather_weights,
    optimizer_tensors,
    restore_random_states,
    restore_states,
    save_random_states,
    save_shards,
)

T = TypeVar("T")
Warn = Callable[[str], None]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or no good one could be read."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps taken, seconds spent in the training loop, samples read.

    samples: None for as many as that many whole batches have.
    """

    step: int = 0
    elapsed: float = 0.0
    samples: int | None = None


class Checkpoints:
    """The checkpoints of one run. keep: how many stay on disk. template: see `write_model`.

    Many ranks share one directory (on one file system) and write into it together.
    """

    def __init__(
        self, out: Path, keep: int, ranks: Ranks | None = None, template: str | None = None
    ) -> None:
        self.directory = out / "checkpoints"
        self.keep, self.template = keep, template
        self.ranks = ranks if ranks is not None else Ranks.alone()
        if self.ranks.first:
            remove_leftovers(self.directory)

    def save(
        self,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        progress: Progress,
    ) -> Path:
        """Write one checkpoint and make it the latest.

        Raises CheckpointError when the disk is full or a weight is not finite; whatever was there
        before stays as it was.
        """
        bad = first_non_finite(model, self.ranks)
        if bad is not None:
            raise CheckpointError(f"weight {bad} is not finite at step {progress.step}: not saved")
        path = self.directory / f"step-{progress.step:08d}"
        state = {
            "format": "nomatmul-checkpoint",
            "version": 1,
            "step": progress.step,
            "elapsed": progress.elapsed,
            "samples": progress.samples,
            "config": config.to_dict(),
        }
        try:
            self._write(path, model, optimizer, tokenizer, state)
        except (LostRankError, OtherRankError):
            raise
        except Exception as error:  # safetensors raises its own type for a full disk
            kept = self.candidates()
            still = f"; {kept[0].name} is intact" if kept else ""
            raise CheckpointError(f"cannot write checkpoint {path}: {error}{still}") from error
        return path

    def _point_to(self, path: Path) -> None:
        write_file(self.directory / "latest", path.name.encode())
        for old in self.candidates()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _write(
        self,
        path: Path,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        state: dict[str, Any],
    ) -> None:
        """All ranks write one directory; the first one gives it its name when all are done."""
        ranks = self.ranks
        with contextlib.ExitStack() as stack:
            made = self._all(
                lambda: str(stack.enter_context(new_directory(path))) if ranks.first else ""
            )
            temporary, weights = Path(made[0]), None
            if ranks.many:
                self._all(lambda: save_shards(model, optimizer, temporary, ranks))
                weights, state = gather_weights(model, ranks), state | {"ranks": ranks.size}
            else:
                save_optimizer(model, optimizer, temporary)
            self._all(lambda: save_random_states(temporary, ranks))

            def describe() -> None:
                if ranks.first:
                    write_model(model, tokenizer, temporary, weights, self.template)
                    write_json(temporary / "state.json", state)

            self._all(describe)
            parts = self._all(lambda: describe_files(temporary, ranks.rank, ranks.size))

            def finish() -> None:
                if ranks.first:
                    write_manifest(temporary, {k: v for part in parts for k, v in part.items()})
                    stack.close()
                    self._point_to(path)

            self._all(finish)

    def _all(self, work: Callable[[], T]) -> list[T]:
        """Everybody's result; an error of one rank is raised at all of them."""
        if not self.ranks.many:
            return [work()]
        try:
            mine: tuple[Any, str | None] = (work(), None)
        except (LostRankError, OtherRankError):
            raise
        except Exception as error:  # sent to all ranks, then raised
            text = str(error).strip()
            mine = (None, text.splitlines()[-1] if text else type(error).__name__)
        results = self.ranks.gather(mine)
        for rank, (_, fault) in enumerate(results):
            if fault is not None:
                raise OSError(fault if fault.startswith("rank ") else f"rank {rank}: {fault}")
        return [value for value, _ in results]

    def candidates(self) -> list[Path]:
        """Checkpoints on disk, the one that `latest` names first, then by falling step."""
        paths = sorted(self.directory.glob("step-*"), reverse=True)
        try:
            latest = (self.directory / "latest").read_text("utf-8").strip()
        except (OSError, ValueError):
            return paths
        return sorted(paths, key=lambda path: path.name != latest)

    def newest_good(self, warn: Warn) -> Path | None:
        """The first candidate whose files match its manifest; None when there is none at all.

        Rank 0 looks, all get the answer. `warn` names each damaged one. Raises CheckpointError
        when all are damaged: starting again from nothing is for the user to decide.
        """

        def find() -> str | None:
            paths = self.candidates()
            for path in paths:
                fault = find_fault(path)
                if fault is None:
                    return str(path)
                warn(f"checkpoint {path.name} is damaged ({fault}); trying the one before")
            if paths:
                raise CheckpointError(f"every checkpoint under {self.directory} is damaged")
            return None

        found = self.ranks.on_first("checking the checkpoints", find)
        return None if found is None else Path(found)


def save_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path
) -> None:
    """Of one device: `restore` reads it."""
    save_file(optimizer_tensors(model, optimizer), directory / "optimizer.safetensors")


def read_state(path: Path) -> tuple[TrainConfig, Progress]:
    """Config and progress of a checkpoint. Raises ValueError for a foreign or newer format."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    if state.get("format") != "nomatmul-checkpoint" or state.get("version") != 1:
        raise ValueError(f"{path} is no checkpoint that this version reads")
    progress = Progress(state["step"], state["elapsed"], state.get("samples"))
    return TrainConfig.from_dict(state["config"]), progress


def restore(
    path: Path,
    model: TextModel,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks | None = None,
) -> None:
    """Load weights, optimiser and random states in place, as they were saved.

    Bit for bit, whatever the numbers of devices were and are. Raises CheckpointError naming a
    tensor that does not fit.
    """
    ranks = ranks if ranks is not None else Ranks.alone()
    try:
        restore_states(path, model, optimizer, ranks)
    except StateError as error:
        raise CheckpointError(str(error)) from None
    restore_random_states(path, ranks)


def export_model(
    model: TrainedModel,
    tokenizer: Tokenizer,
    out: Path,
    step: int,
    ranks: Ranks,
    template: str | None = None,
) -> Path:
    """Write the trained model alone to OUT/model. Raises CheckpointError when that fails."""
    path = out / "model"
    ranks.begin("exporting the model")
    weights = gather_weights(model, ranks) if ranks.many else None

    def write() -> None:
        with writing(path), new_directory(path) as temporary:
            write_model(model, tokenizer, temporary, weights, template)
            write_json(temporary / MODEL_STEP_FILE, {"step": step})

    ranks.on_first("exporting the model", write)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a finished model: CheckpointError, with the place, for what fails."""
    try:
        yield
    except Exception as error:  # full disk: torch, safetensors and OSError have no common base
        raise CheckpointError(
            f"cannot write {path}: {error}; the last checkpoint is intact"
        ) from error


@torch.no_grad()
def first_non_finite(model: torch.nn.Module, ranks: Ranks | None = None) -> str | None:
    """Name of the first parameter with a NaN or infinity, at any rank."""
    named = list(model.named_parameters())
    finite = torch.stack([local(parameter).isfinite().all() for _, parameter in named])
    bad = (ranks if ranks is not None else Ranks.alone()).sum(~finite).tolist()
    return next((name for (name, _), count in zip(named, bad, strict=True) if count), None)
