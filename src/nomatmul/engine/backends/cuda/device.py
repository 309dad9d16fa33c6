"""Whether a GPU can be used, and what is said when it cannot: one line, always a ValueError."""

from __future__ import annotations

import os
import re
from typing import Any

from nomatmul._extras import install_line

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


def check_memory(device: Any, needed: int, embedding_form: str, embedding_bytes: int) -> None:
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
