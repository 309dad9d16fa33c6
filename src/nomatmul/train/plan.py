"""What a device does for a run: asked of it once, then handed down as a `DevicePlan`.

Nothing else in training, fine-tuning or comparisons asks what kind of device it runs on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

import torch

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.cpus import usable_cpus
from nomatmul.models.block import fused_forms
from nomatmul.ops.choose import triton_wanted
from nomatmul.train.config import TrainConfig

_RESIDENT_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """How a run uses its device. The defaults are those of a CPU.

    memory: "host", "device" (its own), or "unknown" (nobody can ask it). threads: torch's, on the
    host; 0 leaves them as they are.
    """

    device: torch.device
    memory: str = "host"
    threads: int = 0
    bfloat16: bool = False  # forward passes run under autocast
    kernels: bool = False  # Triton's kernels serve
    compile: str | None = None  # torch.compile's mode; None: not compiled
    graph: bool = False  # micro-steps are recorded as CUDA graphs
    fused_adamw: bool = False
    resident_bytes: int = 0  # token streams up to this size live on the device ...
    pinned: bool = False  # ... and larger ones come through pinned memory
    deterministic: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of forward passes: bfloat16 where the plan says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def set_up(self) -> None:
        """Set torch's threads and determinism, for the whole process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if not self.deterministic:
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Deterministic mode would fill fresh memory; nothing here reads what it did not write.
        # (torch's stubs do not know the switch.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.memory == "device" and self.compile is not None:
            import torch._inductor.config as inductor  # its kernels else may add atomically

            if hasattr(inductor, "deterministic"):
                inductor.deterministic = True

    def peak_bytes(self) -> int:
        """Device memory at its fullest so far; 0 where nobody counts."""
        return torch.cuda.max_memory_allocated(self.device) if self.memory == "device" else 0


def plan_device(device: torch.device, precision: str = "auto") -> DevicePlan:
    """All that `device` can do, nothing compiled. precision: as TrainConfig's.

    auto is bfloat16 on GPUs that have it; a CPU trains in float32 unless it is asked otherwise.
    """
    cuda = device.type == "cuda"
    low = precision == "bfloat16" or (
        precision == "auto" and cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return DevicePlan(
        device,
        memory={"cuda": "device", "cpu": "host"}.get(device.type, "unknown"),
        # OpenMP knows the affinity mask, but not the quota of a control group.
        threads=min(torch.get_num_threads(), usable_cpus()),
        bfloat16=low,
        kernels=triton_wanted(device.type),
        graph=cuda,
        fused_adamw=cuda,
        resident_bytes=_RESIDENT_BYTES if cuda else 0,
        pinned=cuda,
    )


def plan_training(config: TrainConfig, device: torch.device, many: bool = False) -> DevicePlan:
    """What `config` asks of the device. many: several processes train together.

    compile "auto": on a GPU the step is recorded as a graph or compiled (`records_by_default`), on
    a CPU neither. Raises ValueError for "graph" where there is none.
    """
    plan = plan_device(device, config.precision)
    possible = plan.graph and not many
    if config.compile == "graph" and not possible:
        raise ValueError("compile 'graph' records CUDA graphs: it needs one GPU and one process")
    mode = None if config.compile in ("off", "graph") else config.compile
    recorded = config.compile == "graph"
    if config.compile == "auto":
        recorded = records_by_default(config.model, plan)
        mode = "default" if plan.memory == "device" and not recorded else None
    return dataclasses.replace(
        plan,
        compile="default" if mode == "on" else mode,
        graph=possible and recorded,
        deterministic=config.deterministic,
    )


def fused_mixer(model: ModelConfig, plan: DevicePlan) -> bool:
    """Does this model's token mixer run as one fused operation?"""
    return plan.kernels and fused_forms(model)[0]


def runs_fused(model: ModelConfig, plan: DevicePlan) -> bool:
    """Do this model's blocks run as the fused operations, which torch.compile cannot improve?"""
    return plan.kernels and all(fused_forms(model))


def records_by_default(model: ModelConfig, plan: DevicePlan) -> bool:
    """Is this a model that "auto" records as a CUDA graph on one GPU?

    One whose token mixer is fused. Trees behind it are operations of their own and follow.
    """
    trees = bool(architecture_of(model).trees())
    return runs_fused(model, plan) or (trees and fused_mixer(model, plan))


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


def device_of_rank(name: str, local: int) -> str:
    """The device of process `local` of this machine that torchrun started.

    Raises ValueError where not every process can have one of its own.
    """
    kind = name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if ":" in kind:
        raise ValueError(f"device {name!r}: torchrun gives each process a GPU of its own; say cuda")
    if kind != "cuda":
        return kind
    count = torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if count < here:
        raise ValueError(
            f"{here} processes but {count} GPU{'' if count == 1 else 's'} on this machine: start "
            f"torchrun with --nproc-per-node {max(count, 1)}" + ("" if count else " --device cpu")
        )
    return f"cuda:{local}"
