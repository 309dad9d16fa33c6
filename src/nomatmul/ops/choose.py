"""Which implementation of an operation runs: Triton kernels or plain PyTorch.

The environment variable NOMATMUL_OPS: "" (triton for CUDA tensors where triton works, else plain
PyTorch), "naive", or "triton" (an error where triton cannot serve). A fallback that nobody asked
for is said once, with its reason.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_fallback_reason: str | None = None
_found: dict[tuple[str, str], Callable[..., Any]] = {}


def choice() -> str:
    """The value of NOMATMUL_OPS. Raises ValueError for an unknown one."""
    value = os.environ.get("NOMATMUL_OPS", "")
    if value not in ("", "naive", "triton"):
        raise ValueError(f"NOMATMUL_OPS={value!r} is not known: use naive or triton")
    return value


def fallback_reason() -> str | None:
    """Why plain PyTorch runs where triton was wanted; None if nothing failed."""
    return _fallback_reason


def fall_back(error: Exception) -> None:
    """Use plain PyTorch from now on, and say why."""
    global _fallback_reason
    if _fallback_reason is None:
        lines = str(error).strip().splitlines()
        _fallback_reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        warnings.warn(
            "nomatmul: the Triton kernels cannot be used; slower plain PyTorch runs instead "
            f"({_fallback_reason})",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.compiler.assume_constant_result
def triton_wanted(device_type: str) -> bool:
    """Should triton serve tensors of this kind of device? Tries to import it, falls back once."""
    value = choice()
    if value:
        return value == "triton"
    if device_type != "cuda" or _fallback_reason is not None or torch.version.hip is not None:
        return False
    try:
        importlib.import_module("triton")
    except ImportError as error:
        fall_back(error)
        return False
    return True


def run(name: str, fast: str, plain: ModuleType, x: Tensor, *args: Any, **options: Any) -> Any:
    """Call `name` with (x, *args): in the module named `fast` if triton serves x, else in `plain`.

    fast: full name of a module that needs triton. A kernel that does not compile makes everything
    fall back, unless NOMATMUL_OPS=triton: then its error is raised.
    """
    # float64 is the tests' reference arithmetic; the kernels do not have it.
    if x.dtype != torch.float64 and triton_wanted(x.device.type):
        try:
            kernel = _found.get((fast, name))
            if kernel is None:
                kernel = _found[fast, name] = getattr(importlib.import_module(fast), name)
            return kernel(x, *args, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or driver that does not fit raises
            if choice() == "triton":
                raise
            fall_back(error)
    return getattr(plain, name)(x, *args, **options)
