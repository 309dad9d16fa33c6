"""Checkpoints: written aside and renamed, checked when read, the last few kept.

OUT/checkpoints/step-00001000/ holds the model as `CausalLM.save_pretrained` writes it (config.json,
model.safetensors) with tokenizer.json, so `pack` and `from_pretrained` read it directly; the
optimiser (optimizer.safetensors: exp_avg/NAME, exp_avg_sq/NAME), the random states
(random.safetensors), state.json (step, seconds spent, TrainConfig) and manifest.json (size and
SHA-256 of every file). OUT/checkpoints/latest names the newest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from nomatmul.train.config import TrainConfig
from nomatmul.train.files import new_directory, remove_leftovers, write_json, write_new_file

_MOMENTS = ("exp_avg", "exp_avg_sq")
Warn = Callable[[str], None]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or no good one could be read."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps taken and seconds spent in the training loop."""

    step: int = 0
    elapsed: float = 0.0


class Checkpoints:
    """The checkpoints of one run. keep: how many stay on disk."""

    def __init__(self, out: Path, keep: int) -> None:
        self.directory = out / "checkpoints"
        self.keep = keep
        remove_leftovers(self.directory)

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        progress: Progress,
    ) -> Path:
        """Write one checkpoint and make it the latest.

        Raises CheckpointError when the disk is full or a weight is not finite; whatever was there
        before stays as it was.
        """
        bad = first_non_finite(model)
        if bad is not None:
            raise CheckpointError(f"weight {bad} is not finite at step {progress.step}: not saved")
        path = self.directory / f"step-{progress.step:08d}"
        try:
            with new_directory(path) as temporary:
                write_model(model, tokenizer, temporary)
                save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
                save_file(_random_states(), temporary / "random.safetensors")
                state = {
                    "format": "nomatmul-checkpoint",
                    "version": 1,
                    "step": progress.step,
                    "elapsed": progress.elapsed,
                    "config": config.to_dict(),
                }
                write_json(temporary / "state.json", state)
                write_json(temporary / "manifest.json", _manifest(temporary))
            write_new_file(self.directory / "latest", path.name.encode())
        except Exception as error:  # safetensors raises its own type for a full disk
            kept = self.candidates()
            still = f"; {kept[0].name} is intact" if kept else ""
            raise CheckpointError(f"cannot write checkpoint {path}: {error}{still}") from error
        for old in self.candidates()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return path

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

        Each damaged one is told by `warn`. Raises CheckpointError when all are damaged: starting
        again from nothing is for the user to decide.
        """
        paths = self.candidates()
        for path in paths:
            fault = find_fault(path)
            if fault is None:
                return path
            warn(f"checkpoint {path.name} is damaged ({fault}); trying the one before")
        if paths:
            raise CheckpointError(f"every checkpoint under {self.directory} is damaged")
        return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {facts['bytes']} were written"
            if _sha256(file) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {error}"
    return None


def read_state(path: Path) -> tuple[TrainConfig, Progress]:
    """Config and progress of a checkpoint. Raises ValueError for a foreign or newer format."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    if state.get("format") != "nomatmul-checkpoint" or state.get("version") != 1:
        raise ValueError(f"{path} is no checkpoint that this version reads")
    return TrainConfig.from_dict(state["config"]), Progress(state["step"], state["elapsed"])


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimiser and random states in place, bit for bit as they were saved."""
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name in missing if _is_tied(model, name, weights)}
    if unexpected or set(missing) - tied:
        names = [*unexpected, *sorted(set(missing) - tied)]
        raise CheckpointError(f"{path} does not fit the model: {names[0]}")
    tensors = load_file(path / "optimizer.safetensors")
    steps = tensors["step"].item()
    for name, parameter in _trained(model):
        state = {
            key: tensors[f"{key}/{name}"].to(parameter.device, parameter.dtype) for key in _MOMENTS
        }
        state["step"] = _step_tensor(optimizer, parameter, steps)
        optimizer.state[parameter] = state
    states = load_file(path / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_model(model: torch.nn.Module, tokenizer: Tokenizer, directory: Path) -> None:
    """The model alone, in the layout that `CausalLM.from_pretrained` and `pack` read."""
    with _no_progress_bars():
        model.save_pretrained(directory)  # type: ignore[operator]
    write_new_file(directory / "tokenizer.json", tokenizer.to_str().encode("utf-8"))


@torch.no_grad()
def first_non_finite(model: torch.nn.Module) -> str | None:
    """Name of the first parameter with a NaN or infinity."""
    named = list(model.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for _, parameter in named]).tolist()
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    steps = 0.0
    for name, parameter in _trained(model):
        state = optimizer.state.get(parameter)
        for key in _MOMENTS:
            value = state[key] if state else torch.zeros_like(parameter)
            tensors[f"{key}/{name}"] = value.detach().contiguous()
        steps = float(state["step"]) if state else 0.0
    tensors["step"] = torch.tensor(steps, dtype=torch.float64)
    return tensors


def _step_tensor(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: float
) -> Tensor:
    fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    device = parameter.device if fused else torch.device("cpu")
    return torch.tensor(steps, dtype=torch.float32, device=device)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _is_tied(model: torch.nn.Module, name: str, weights: dict[str, Tensor]) -> bool:
    """Whether a tensor that the file lacks is another name of one that it has."""
    state = model.state_dict(keep_vars=True)
    return any(state[other] is state[name] for other in weights if other in state)


def _manifest(directory: Path) -> dict[str, Any]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        "files": {
            str(path.relative_to(directory)): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in files
        }
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
