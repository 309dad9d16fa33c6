"""The walk and the sum on a CPU by the native core; names and arguments as in `naive`.

Everything is float32 inside. Logits are summed in one fixed order on every instruction set
(docs/numerics.md), weight gradients row by row over the visits sorted by row: the same bits in
every run, on any number of threads.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels, V rows, A = T * L.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.activations import activate


@functools.cache
def _core() -> Any:
    """`nomatmul._native.fff`, None where the core is not built."""
    try:
        return importlib.import_module("nomatmul._native").fff
    except ImportError:  # the package works without: `naive` serves
        return None


def available() -> bool:
    """Is the native core built?"""
    return _core() is not None


def _ready() -> Any:
    if not available():
        raise ValueError("fff: implementation 'native' needs the native core, which is not built")
    return _core()


def _array(x: Tensor) -> np.ndarray:
    # not Tensor.numpy(): it forbids to resize the storage, which FSDP does to parameters
    x = x.detach()
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    return np.from_dlpack(x)


def _rows(nodes_NTL: Tensor) -> np.ndarray:
    return nodes_NTL.flatten(1).contiguous().numpy()


def walk(
    x_NK: Tensor, w_in_VK: Tensor, bias_V: Tensor | None, trees: int, depth: int
) -> tuple[Tensor, Tensor]:
    """As `naive.walk`. Raises ValueError for a logit that is not finite, too."""
    logits_NTL = torch.empty(len(x_NK), trees, depth + 1, dtype=torch.float32)
    rows_NTL = torch.empty(logits_NTL.shape, dtype=torch.int32)
    if len(x_NK):
        bias = None if bias_V is None else _array(bias_V)
        outputs = logits_NTL.numpy(), rows_NTL.numpy()
        threads = torch.get_num_threads()
        _ready().walk(_array(x_NK), _array(w_in_VK), bias, *outputs, trees, depth, threads)
    return logits_NTL, rows_NTL


def _weighted_rows(weights_NTL: Tensor, nodes_NTL: Tensor, table_VD: Tensor) -> Tensor:
    y_ND = torch.empty(len(weights_NTL), table_VD.shape[1], dtype=torch.float32)
    if len(y_ND):
        weights = _array(weights_NTL.flatten(1))
        arguments = weights, _rows(nodes_NTL), _array(table_VD), y_ND.numpy()
        _ready().combine(*arguments, torch.get_num_threads())
    return y_ND


def _outer_sums(
    weights_NTL: Tensor, nodes_NTL: Tensor, x_ND: Tensor, like_VD: Tensor, sums_V: Tensor | None
) -> Tensor:
    total_VD = torch.zeros(like_VD.shape, dtype=torch.float32)
    if len(x_ND):
        arguments = _array(weights_NTL.flatten(1)), _rows(nodes_NTL), _array(x_ND)
        sums = None if sums_V is None else sums_V.numpy()
        _ready().segment_sum(*arguments, total_VD.numpy(), sums, torch.get_num_threads())
    return total_VD.to(like_VD.dtype)


def infers(implementation: str, *operands: Tensor | None) -> bool:
    """Can `fff` serve these operands as it is? Nobody differentiates, compiles or traces them.

    Then the operator of torch around it is left out: it costs three times the walk.
    """
    if torch.compiler.is_compiling() or implementation not in ("", "native"):
        return False
    given = [t for t in operands if t is not None]
    plain = all(
        type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.is_cpu
        for t in given
    )
    if not plain or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    traced = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    return not traced and choose.choice() == "" and available()


def fff(
    x_NK: Tensor,
    w_in_VK: Tensor,
    w_out_VD: Tensor,
    bias_V: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive.fff`, the bits of `walk` and `combine`; no gradient.

    Raises ValueError for a logit that is not finite.
    """
    core, threads, tokens = _ready(), torch.get_num_threads(), len(x_NK)
    logits_NTL = torch.empty(tokens, trees, depth + 1, dtype=torch.float32)
    rows_NTL = torch.empty(tokens, trees, depth + 1, dtype=torch.int32)
    y_ND = torch.empty(tokens, w_out_VD.shape[1], dtype=torch.float32)
    if tokens:
        bias = None if bias_V is None else _array(bias_V)
        logits, rows = logits_NTL.numpy(), rows_NTL.numpy()
        core.walk(_array(x_NK), _array(w_in_VK), bias, logits, rows, trees, depth, threads)
        h = activate(logits_NTL, activation).numpy().reshape(tokens, -1)
        core.combine(h, rows.reshape(tokens, -1), _array(w_out_VD), y_ND.numpy(), threads)
    return y_ND, logits_NTL, rows_NTL


def walk_backward(
    dlogits_NTL: Tensor, nodes_NTL: Tensor, x_NK: Tensor, w_in_VK: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive.walk_backward`."""
    dx_NK = _weighted_rows(dlogits_NTL, nodes_NTL, w_in_VK)
    dbias = torch.zeros(len(w_in_VK) if with_bias else 0, dtype=torch.float32)
    sums = dbias if with_bias else None
    dw_VK = _outer_sums(dlogits_NTL, nodes_NTL, x_NK, w_in_VK, sums)
    return dx_NK.to(x_NK.dtype), dw_VK, dbias


def project(x_NK: Tensor, nodes_NTL: Tensor, w_VK: Tensor) -> Tensor:
    """As `naive.project`."""
    out_NA = torch.zeros(nodes_NTL.flatten(1).shape, dtype=torch.float32)
    if len(x_NK):
        arguments = _array(x_NK), _rows(nodes_NTL), _array(w_VK), out_NA.numpy()
        _ready().gather_dot(*arguments, torch.get_num_threads())
    return out_NA.view(nodes_NTL.shape)


def combine(h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor) -> Tensor:
    """As `naive.combine`."""
    return _weighted_rows(h_NTL, nodes_NTL, w_out_VD)


def combine_backward(
    dy_ND: Tensor, h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor
) -> tuple[Tensor, Tensor]:
    """As `naive.combine_backward`."""
    dh_NTL = project(dy_ND, nodes_NTL, w_out_VD)
    return dh_NTL.to(h_NTL.dtype), _outer_sums(h_NTL, nodes_NTL, dy_ND, w_out_VD, None)
