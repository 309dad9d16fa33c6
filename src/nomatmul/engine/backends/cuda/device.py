"""Whether a GPU can be used, and what is said when it cannot: one line, always a ValueError."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from nomatmul._extras import install_line

if TYPE_CHECKING:
    import torch

# Set (by tests) to run triton's interpreter on CPU tensors in place of a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def torch_device(device: str) -> Any:
    """Return the torch.device of "cuda" or "cuda:N".

    Raises ValueError when the name is wrong, or torch, a GPU, that GPU or triton is not there.
    """
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise ValueError(f'device is {device!r}; it must be "cpu", "cuda" or "cuda:N"')
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"device {device!r} needs torch ({error}): {install_line()}") from None
    try:
        import triton  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ValueError(
            f"device {device!r} needs triton ({error}); torch's GPU wheels bring it on Linux"
        ) from None
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is seen"
        raise ValueError(f"device {device!r} cannot be used: {why}; device='cpu' runs everywhere")
    count = torch.cuda.device_count()
    number = torch.cuda.current_device() if match[1] is None else int(match[1])
    if number >= count:
        raise ValueError(f"device {device!r} does not exist; this machine has {count} (from 0)")
    major, minor = torch.cuda.get_device_capability(number)
    if (major, minor) < (7, 5):
        raise ValueError(
            f"device {device!r} has compute capability {major}.{minor}; at least 7.5 is needed"
        )
    return torch.device("cuda", number)


class CudaDevice:
    """A GPU as tables name and measure it; see `nomatmul.engine.backend.Gpu`. Of the interpreter,
    which has none, `weight_bytes` are all the memory that is in use."""

    def __init__(self, device: torch.device, weight_bytes: int) -> None:
        self._device, self._weight_bytes = device, weight_bytes

    def name(self) -> str:
        import torch

        if self._device.type != "cuda":
            return "CPU, interpreted"
        return str(torch.cuda.get_device_name(self._device))

    def peak_bytes(self) -> int:
        import torch

        if self._device.type != "cuda":
            return self._weight_bytes
        return int(torch.cuda.max_memory_allocated(self._device))

    def copy_bandwidth(self, nbytes: int = 1 << 30) -> float:
        """See Gpu. The best of five; less where the memory has no room for two such pieces."""
        import torch

        if self._device.type != "cuda":
            return 1.0
        free, _ = torch.cuda.mem_get_info(self._device)
        nbytes = min(nbytes, free // 4)
        source = torch.ones(nbytes, dtype=torch.uint8, device=self._device)
        target, best = torch.empty_like(source), float("inf")
        for _ in range(5):
            start, end = [_event() for _ in range(2)]
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return 2 * nbytes / best


def _event() -> Any:
    import torch

    event: Any = torch.cuda.Event  # which torch itself does not type
    return event(enable_timing=True)


def check_memory(
    device: torch.device, needed: int, embedding_form: str, embedding_bytes: int
) -> None:
    """Raise ValueError when `needed` bytes are not free, with what would fit."""
    import torch

    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed <= free:
        return
    saved = embedding_bytes - embedding_bytes // {"bf16": 2, "f32": 4}.get(embedding_form, 1)
    hint = "device='cpu' runs it in main memory"
    if saved and needed - saved <= free:
        hint = f"packed with --embedding int8 it needs {_gb(needed - saved)} and fits"
    raise ValueError(
        f"the model needs {_gb(needed)} of device memory, {device} has {_gb(free)} free of"
        f" {_gb(total)}; {hint}"
    )


def describe(error: Exception) -> str:
    """The first telling line of a compiler's or driver's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
