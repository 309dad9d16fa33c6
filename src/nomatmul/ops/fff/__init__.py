"""Fast feedforward: the conditional walk through trees and the sum over visited rows.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L = depth + 1 levels, V rows of all trees.

Tree t's node j is row t * (2^L - 1) + j; its children are 2j + 1 (left) and 2j + 2 (right, where
logit > 0). Every visited node adds activation(logit) * w_out[row] (arXiv 2311.10770).

Each operation is one operator of torch, opaque to torch.compile: no graph break, and nothing of it
is unrolled. `implementation` says what runs inside:

- None picks: Triton for tensors on a GPU, the native core for float32 on a CPU where it is built,
  else plain PyTorch; float64 is always plain PyTorch (`nomatmul.ops.choose` has NOMATMUL_OPS);
- "naive", "triton", "native": this one, or an error;
- "masked": the dense reference, differentiated by autograd.

A logit that is NaN is a ValueError on a CPU, compiled or not ("masked": not if compiled). On a GPU
nobody looks, it would have to wait; there NaN goes left and poisons the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nomatmul.formats.tree_dials import TREE_ACTIVATIONS as ACTIVATIONS
from nomatmul.ops.activations import activate, check_activation
from nomatmul.ops.fff import masked, native
from nomatmul.ops.fff.operators import check_logits, combine_op, fff_op, walk_op
from nomatmul.ops.fff.surrogate import activate_routed, route_factor

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "MAX_DEPTH",
    "MAX_ROWS",
    "activate",
    "activate_routed",
    "check_activation",
    "combine",
    "fff",
    "route_factor",
    "walk",
]

IMPLEMENTATIONS = ("naive", "masked", "triton", "native")
MAX_DEPTH = 24
MAX_ROWS = (1 << 31) - 1  # rows are int32


def _check(
    x: Tensor, w_in: Tensor, bias: Tensor | None, trees: int, depth: int, name: str | None
) -> str:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} is not known: use one of {IMPLEMENTATIONS}")
    if trees < 1:
        raise ValueError(f"fff: trees is {trees}, it must be at least 1")
    if not 0 <= depth <= MAX_DEPTH:
        raise ValueError(f"fff: depth is {depth}, it must lie in 0..{MAX_DEPTH}")
    rows = trees * ((2 << depth) - 1)
    if w_in.dim() != 2 or w_in.shape[0] != rows:
        raise ValueError(
            f"fff: {trees} trees of depth {depth} have {rows} nodes, "
            f"w_in has shape {tuple(w_in.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != w_in.shape[1]:
        raise ValueError(f"fff: x must be [N, {w_in.shape[1]}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"fff: bias must be [{rows}], got {tuple(bias.shape)}")
    return name or ""


def _lowered(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Operands in autocast's type, where it is on; else in their own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(t.to(dtype) for t in (x, *weights))
    return x, *weights


def walk(
    x: Tensor,
    w_in: Tensor,
    bias: Tensor | None = None,
    *,
    trees: int,
    depth: int,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and rows of the nodes that each token visits.

    x: float [N, K]; w_in: float [V, K]; bias: [V]. Operands take autocast's type; products of 16
    bit operands are summed in float32, so whole numbers below 2^8 give exact logits up to 2^24.

    Returns (logits [N, T, L] float32, float64 for float64; rows int32 [N, T, L]). Gradients for x,
    w_in and bias through the logits. Raises ValueError for shapes that disagree and NaN logits.
    """
    name = _check(x, w_in, bias, trees, depth, implementation)
    x, w_in = _lowered(x, w_in)
    if name != "masked":
        return walk_op(x, w_in, bias, trees, depth, name)
    logits, nodes = masked.walk(x, w_in, bias, trees, depth)
    return (logits if torch.compiler.is_compiling() else check_logits(logits)), nodes


def combine(
    h: Tensor, nodes: Tensor, w_out: Tensor, *, implementation: str | None = None
) -> Tensor:
    """y [N, D] = sum over t, l of h[n, t, l] * w_out[nodes[n, t, l]].

    h: float [N, T, L]; nodes: int32, from `walk`; w_out: float [V, D], in autocast's type where it
    is on. Sums, and y, are float32 (float64 for float64). Gradients for h and w_out. Raises
    ValueError if the shapes disagree.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not known: {IMPLEMENTATIONS}")
    if h.dim() != 3 or h.shape != nodes.shape:
        raise ValueError(
            f"fff: h {tuple(h.shape)} and nodes {tuple(nodes.shape)} must have one shape [N, T, L]"
        )
    if w_out.dim() != 2:
        raise ValueError(f"fff: w_out must be [V, D], got {tuple(w_out.shape)}")
    if torch.is_autocast_enabled(h.device.type) and w_out.dtype != torch.float64:
        w_out = w_out.to(torch.get_autocast_dtype(h.device.type))
    if implementation == "masked":
        with torch.autocast(h.device.type, enabled=False):
            return masked.combine(h, nodes, w_out)
    return combine_op(h, nodes, w_out, implementation or "")


def fff(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias: Tensor | None = None,
    *,
    trees: int,
    depth: int,
    activation: str = "gelu",
    route_gradient: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer: `walk`, activation, `combine`; remembers x, logits and rows only.

    x: float [N, K]; w_in: [V, K]; w_out: [V, D]; bias: [V]. route_gradient: decisions get the
    gradient of `surrogate`; no value changes.

    Returns (y [N, D] in x's type, or autocast's; logits and rows as `walk`), with gradients for x,
    w_in, w_out and bias from y and from the logits. Raises ValueError as `walk`.
    """
    check_activation(activation, ACTIVATIONS)
    name = _check(x, w_in, bias, trees, depth, implementation)
    if w_out.dim() != 2 or w_out.shape[0] != w_in.shape[0]:
        raise ValueError(f"fff: w_out must be [{w_in.shape[0]}, D], got {tuple(w_out.shape)}")
    x, w_in, w_out = _lowered(x, w_in, w_out)
    if native.infers(name, x, w_in, w_out, bias):
        return native.fff(x, w_in, w_out, bias, trees, depth, activation)
    if name != "masked":
        return fff_op(x, w_in, w_out, bias, trees, depth, activation, route_gradient, name)
    result = masked.fff(x, w_in, w_out, bias, trees, depth, activation, route_gradient)
    if not torch.compiler.is_compiling():
        check_logits(result[1])
    return result[0].to(x.dtype), result[1], result[2]
