"""Weights and optimiser on disk and back, for one device and for many.

One device writes model.safetensors and optimizer.safetensors (exp_avg/NAME, exp_avg_sq/NAME, step).
Many write `shards/` with torch.distributed.checkpoint, each process its part, and rank 0 writes
model.safetensors as well, so that every checkpoint is a model directory. Either kind is read by any
number of devices: a process reads the rows that it holds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from nomatmul.models.base import TextModel
from nomatmul.train.parallelize import local, whole
from nomatmul.train.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDS = "shards"


class StateError(RuntimeError):
    """A checkpoint's tensors do not fit the model, or are not there."""


def save_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, ranks: Ranks
) -> None:
    """Write this process's part of weights and moments; all processes call it together."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= optimizer_tensors(model, optimizer)
    writer = dcp.FileSystemWriter(directory / SHARDS)
    with _one_failure():
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)


@contextlib.contextmanager
def _one_failure() -> Iterator[None]:
    """What DCP raises is no Exception, and holds those of all ranks: raise the first as OSError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items(), key=lambda item: item[0])))
        text = str(cause).strip().splitlines()
        reason = text[0] if text else type(cause).__name__
        raise OSError(f"rank {rank}: {reason}") from None


def gather_weights(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """All weights on rank 0's CPU, one tensor at a time on the device; {} elsewhere."""
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if ranks.first:
            weights[name] = tensor.cpu()
    return weights


def restore_states(
    path: Path, model: TextModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Load weights and moments in place from a checkpoint of any number of devices.

    Raises StateError naming the tensor that is missing, unknown or of another shape.
    """
    if (path / SHARDS).is_dir():
        steps = _load_shards(path, model, optimizer, ranks)
    else:
        steps = _load_files(path, model, optimizer)
    for _, parameter in trained(model):
        optimizer.state[parameter]["step"] = _step_tensor(optimizer, parameter, steps)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what the optimiser moves."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """exp_avg/NAME and exp_avg_sq/NAME (zeros before the first step), and step."""
    tensors: dict[str, Tensor] = {}
    steps = 0.0
    for name, parameter in trained(model):
        state = optimizer.state.get(parameter)
        for key in MOMENTS:
            value = state[key] if state else torch.zeros_like(parameter)
            tensors[f"{key}/{name}"] = value.detach().contiguous()
        steps = float(state["step"]) if state else 0.0
    tensors["step"] = torch.tensor(steps, dtype=torch.float64)
    return tensors


def save_random_states(directory: Path, ranks: Ranks) -> None:
    """The random states of this process. (Training draws from them before its first step only.)"""
    save_file(_random_states(), directory / _random_name(ranks))


def restore_random_states(path: Path, ranks: Ranks) -> None:
    """This process's own, or rank 0's where the checkpoint is of fewer processes."""
    names = (_random_name(ranks), "random.safetensors", "random-0000.safetensors")
    states = load_file(next(path / name for name in names if (path / name).is_file()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _random_name(ranks: Ranks) -> str:
    return f"random-{ranks.rank:04d}.safetensors" if ranks.many else "random.safetensors"


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_shards(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> float:
    reader = dcp.FileSystemReader(path / SHARDS)
    stored = {
        name: tuple(facts.size)
        for name, facts in reader.read_metadata().state_dict_metadata.items()
        if hasattr(facts, "size")
    }
    weights = {name: p.detach() for name, p in model.named_parameters()}
    prefix = "model/"
    saved = {n.removeprefix(prefix): s for n, s in stored.items() if n.startswith(prefix)}
    _check_shapes(path, saved, {name: tuple(p.shape) for name, p in weights.items()})
    tensors: dict[str, Any] = {prefix + name: tensor for name, tensor in weights.items()}
    for name, parameter in trained(model):
        state = {key: torch.zeros_like(parameter) for key in MOMENTS}
        optimizer.state[parameter] = state
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    tensors["step"] = torch.zeros((), dtype=torch.float64)
    with warnings.catch_warnings():  # torch wonders whether a single process is meant: it is
        warnings.simplefilter("ignore", UserWarning)
        with _one_failure():
            dcp.load(
                tensors, storage_reader=reader, process_group=ranks.group, no_dist=not ranks.many
            )
    return tensors["step"].item()


def _load_files(path: Path, model: TextModel, optimizer: torch.optim.Optimizer) -> float:
    parameters = dict(model.named_parameters())
    files = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 (it is no dictionary)
                files[name] = file
                shapes[name] = tuple(content.get_slice(name).get_shape())
    if model.config.tie_word_embeddings:
        shapes.pop("head.weight", None)
    _check_shapes(path, shapes, {name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(_read(files[name], name, parameter))
    file = path / "optimizer.safetensors"
    for name, parameter in trained(model):
        state = {key: torch.zeros_like(parameter) for key in MOMENTS}
        for key, value in state.items():
            local(value).copy_(_read(file, f"{key}/{name}", parameter))
        optimizer.state[parameter] = state
    with safe_open(file, "pt") as content:
        return content.get_tensor("step").item()


def _read(file: Path, name: str, like: Tensor) -> Tensor:
    """The rows of a stored tensor that `like` holds here."""
    with safe_open(file, "pt") as content:
        if not isinstance(like, DTensor):
            return content.get_tensor(name)
        mesh = like.device_mesh
        rows = -(-like.shape[0] // mesh.size())  # as torch.chunk cuts
        start = min(mesh.get_local_rank() * rows, like.shape[0])
        stop = min(start + rows, like.shape[0])
        assert stop - start == like.to_local().shape[0]
        return content.get_slice(name)[start:stop]


def _check_shapes(
    path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            raise StateError(f"{path} does not fit the model: it lacks {name}")
        if name not in wanted:
            raise StateError(f"{path} does not fit the model: {name} is unknown")
        if stored[name] != wanted[name]:
            raise StateError(
                f"{path} does not fit the model: {name} has shape {list(stored[name])}, the model "
                f"needs {list(wanted[name])}"
            )


def _step_tensor(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: float) -> Tensor:
    fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    device = parameter.device if fused else torch.device("cpu")
    return torch.tensor(steps, dtype=torch.float32, device=device)
