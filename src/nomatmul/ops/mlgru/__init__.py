"""MLGRU's recurrence h_t = f_t * h_(t-1) + i_t: one function that picks the implementation.

Shape suffixes: B sequences, T steps, D channels.

The scan is one operator of torch, opaque to torch.compile: no graph break, nothing unrolled.
Inside it, float32 on a GPU goes to Triton and everything else to `naive.blocked_scan`. The
environment variable NOMATMUL_OPS forces "naive" or "triton" (an error if triton cannot serve).
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nomatmul.ops.mlgru import naive
from nomatmul.ops.mlgru.naive import mlgru_recurrent

__all__ = ["mlgru_recurrent", "mlgru_scan"]

_fallback_reason: str | None = None


def _fall_back(error: Exception) -> None:
    global _fallback_reason
    if _fallback_reason is None:
        _fallback_reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            "nomatmul: the Triton kernel of MLGRU cannot be used; the slower plain PyTorch scan "
            f"runs instead ({_fallback_reason})",
            RuntimeWarning,
            stacklevel=2,
        )


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton module if it should serve `x`, else None."""
    choice = os.environ.get("NOMATMUL_OPS", "")
    if choice not in ("", "naive", "triton"):
        raise ValueError(f"NOMATMUL_OPS={choice!r} is not known: use naive or triton")
    wanted = x.is_cuda and x.dtype == torch.float32
    if choice == "triton":
        return importlib.import_module("nomatmul.ops.mlgru.triton")
    if choice == "naive" or not wanted or _fallback_reason is not None:
        return None
    try:
        return importlib.import_module("nomatmul.ops.mlgru.triton")
    except ImportError as error:
        _fall_back(error)
        return None


def _guarded(name: str, fallback: str, *tensors: Tensor) -> Any:
    kernels = _kernels(tensors[0])
    if kernels is not None:
        try:
            return getattr(kernels, name)(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or driver that triton does not support
            if os.environ.get("NOMATMUL_OPS") == "triton":
                raise
            _fall_back(error)
    return getattr(naive, fallback)(*tensors)


@torch.library.custom_op("nomatmul::mlgru_scan", mutates_args=())
def _scan(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    return _guarded("scan", "blocked_scan", i_BTD, f_BTD, h0_BD).contiguous()


@_scan.register_fake
def _(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    return torch.empty_like(i_BTD, memory_format=torch.contiguous_format)


@torch.library.custom_op("nomatmul::mlgru_scan_backward", mutates_args=())
def _scan_backward(
    dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _guarded("scan_backward", "blocked_scan_backward", dh_BTD, f_BTD, h_BTD, h0_BD)
    di_BTD, df_BTD, dh0_BD = grads
    return di_BTD.contiguous(), df_BTD.contiguous(), dh0_BD.contiguous()


@_scan_backward.register_fake
def _(dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(f_BTD), like(f_BTD), like(h0_BD)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, f_BTD, h0_BD = inputs
    ctx.save_for_backward(f_BTD, output, h0_BD)


def _backward(ctx: Any, dh_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f_BTD, h_BTD, h0_BD = ctx.saved_tensors
    return _scan_backward(dh_BTD, f_BTD, h_BTD, h0_BD)


_scan.register_autograd(_backward, setup_context=_setup_context)


def mlgru_scan(i: Tensor, f: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All states of h_t = f_t * h_(t-1) + i_t and the last one.

    i, f: [B, T, D], T >= 1; h0: [B, D] or None (zeros). float64 stays float64, every other type
    is computed in float32 whatever autocast says.

    Returns (h [B, T, D], h_last [B, D]), equal to `mlgru_recurrent` to float rounding, with
    gradients for i, f and h0 from both. Raises ValueError if the shapes disagree.
    """
    if i.dim() != 3 or i.shape != f.shape or i.shape[1] < 1:
        raise ValueError(
            f"mlgru_scan needs i and f of one shape [B, T, D] with T >= 1, got "
            f"{tuple(i.shape)} and {tuple(f.shape)}"
        )
    dtype = torch.float64 if i.dtype == torch.float64 else torch.float32
    i, f = i.to(dtype), f.to(dtype)
    if h0 is None:
        h0 = torch.zeros_like(i[:, 0])
    elif h0.shape != (i.shape[0], i.shape[2]):
        raise ValueError(f"mlgru_scan: h0 has shape {tuple(h0.shape)}, i {tuple(i.shape)}")
    h0 = h0.to(dtype)
    if i.shape[1] == 1:  # decoding: one step needs no scan
        h_BD = f[:, 0] * h0 + i[:, 0]
        return h_BD.unsqueeze(1), h_BD
    h = _scan(i, f, h0)
    return h, h[:, -1]
