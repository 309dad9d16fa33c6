"""The operators of torch behind `nomatmul.ops.fff`, and which implementation runs inside.

An implementation is a module with these functions; operands are contiguous or not, outputs new:

    walk(x, w_in, bias | None, trees, depth) -> (logits, nodes)
    walk_backward(dlogits, nodes, x, w_in, with_bias) -> (dx, dw_in, dbias)
    combine(h, nodes, w_out) -> y
    combine_backward(dy, h, nodes, w_out) -> (dh, dw_out)
    fff(x, w_in, w_out, bias | None, trees, depth, activation) -> (y, logits, nodes)

Types: logits and y of `combine` are float32 (float64 for float64), nodes int32 rows, gradients have
the type of what they belong to (dbias that of the logits, empty without a bias), y of `fff` either.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.activations import activate
from nomatmul.ops.fff import naive
from nomatmul.ops.fff.surrogate import activate_backward

_FAST = "nomatmul.ops.fff.triton"
_NATIVE = "nomatmul.ops.fff.native"

# -- who computes ---------------------------------------------------------------------------------


def _plain(x: Tensor) -> ModuleType:
    """The module that computes x where Triton does not: native on a CPU where it can, or naive."""
    if x.device.type == "cpu" and x.dtype != torch.float64 and choose.choice() == "":
        native = importlib.import_module(_NATIVE)
        if native.available():
            return native
    return naive


def _named(implementation: str) -> ModuleType:
    return (
        naive
        if implementation == "naive"
        else importlib.import_module(_FAST if implementation == "triton" else _NATIVE)
    )


def call(name: str, implementation: str, x: Tensor, *args: Any) -> Any:
    """Run a function of the implementation that serves x; `implementation` "" picks."""
    # operators of torch inside would be lowered by autocast once more
    with torch.autocast(x.device.type, enabled=False):
        if implementation:
            return getattr(_named(implementation), name)(x, *args)
        return choose.run(name, _FAST, _plain(x), x, *args)


def check_logits(logits: Tensor) -> Tensor:
    """The logits; raises ValueError where one is NaN (on a CPU: a GPU would have to wait)."""
    if logits.device.type == "cpu" and bool(torch.isnan(logits).any()):
        raise ValueError("fff: a logit is NaN, so no path can be taken; look at inputs and weights")
    return logits


def _float(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -- the operators --------------------------------------------------------------------------------


@torch.library.custom_op(
    "nomatmul::fff_walk",
    mutates_args=(),
    schema="(Tensor x, Tensor w_in, Tensor? bias, int trees, int depth, str implementation)"
    " -> (Tensor, Tensor)",
)
def walk_op(
    x: Tensor, w_in: Tensor, bias: Tensor | None, trees: int, depth: int, implementation: str
) -> tuple[Tensor, Tensor]:
    """(logits float [N, T, L], rows int32 [N, T, L]) of x [N, K]; see `fff.walk`."""
    logits, nodes = call("walk", implementation, x, w_in, bias, trees, depth)
    return check_logits(logits), nodes


@walk_op.register_fake
def _(
    x: Tensor, w_in: Tensor, bias: Tensor | None, trees: int, depth: int, implementation: str
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], trees, depth + 1)
    return x.new_empty(shape, dtype=_float(x)), x.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op(
    "nomatmul::fff_walk_backward",
    mutates_args=(),
    schema="(Tensor dlogits, Tensor nodes, Tensor x, Tensor w_in, bool with_bias,"
    " str implementation) -> (Tensor, Tensor, Tensor)",
)
def _walk_backward(
    dlogits: Tensor, nodes: Tensor, x: Tensor, w_in: Tensor, with_bias: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return call("walk_backward", implementation, dlogits, nodes, x, w_in, with_bias)


@_walk_backward.register_fake
def _(
    dlogits: Tensor, nodes: Tensor, x: Tensor, w_in: Tensor, with_bias: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    bias = dlogits.new_empty(w_in.shape[0] if with_bias else 0)
    return torch.empty_like(x), torch.empty_like(w_in), bias


@torch.library.custom_op(
    "nomatmul::fff_combine",
    mutates_args=(),
    schema="(Tensor h, Tensor nodes, Tensor w_out, str implementation) -> Tensor",
)
def combine_op(h: Tensor, nodes: Tensor, w_out: Tensor, implementation: str) -> Tensor:
    """y float [N, D] of h [N, T, L] and the rows that a walk visited; see `fff.combine`."""
    return call("combine", implementation, h, nodes, w_out)


@combine_op.register_fake
def _(h: Tensor, nodes: Tensor, w_out: Tensor, implementation: str) -> Tensor:
    return w_out.new_empty((h.shape[0], w_out.shape[1]), dtype=_float(w_out))


@torch.library.custom_op(
    "nomatmul::fff_combine_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor h, Tensor nodes, Tensor w_out, str implementation)"
    " -> (Tensor, Tensor)",
)
def _combine_backward(
    dy: Tensor, h: Tensor, nodes: Tensor, w_out: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    return call("combine_backward", implementation, dy, h, nodes, w_out)


@_combine_backward.register_fake
def _(
    dy: Tensor, h: Tensor, nodes: Tensor, w_out: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(w_out)


_FFF_ARGUMENTS = (
    "Tensor x, Tensor w_in, Tensor w_out, Tensor? bias, int trees, int depth, str activation,"
    " bool route_gradient, str implementation"
)


@torch.library.custom_op(
    "nomatmul::fff", mutates_args=(), schema=f"({_FFF_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def fff_op(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
    route_gradient: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, D] in x's type, logits, rows) of the whole layer; see `fff.fff`."""
    shape = (trees, depth, activation)
    y, logits, nodes = call("fff", implementation, x, w_in, w_out, bias, *shape)
    return y.to(x.dtype), check_logits(logits), nodes


@fff_op.register_fake
def _(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
    route_gradient: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], trees, depth + 1)
    y = x.new_empty((x.shape[0], w_out.shape[1]))
    return y, x.new_empty(shape, dtype=_float(x)), x.new_empty(shape, dtype=torch.int32)


# -- their gradients ------------------------------------------------------------------------------


def _walk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_in, bias, _, _, ctx.implementation = inputs
    ctx.save_for_backward(output[1], x, w_in, *([] if bias is None else [bias]))


def _walk_gradient(ctx: Any, dlogits: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    nodes, x, w_in, *bias = ctx.saved_tensors
    dx, dw, db = _walk_backward(
        dlogits.contiguous(), nodes, x, w_in, bool(bias), ctx.implementation
    )
    return dx, dw, db.to(bias[0].dtype) if bias else None, None, None, None


walk_op.register_autograd(_walk_gradient, setup_context=_walk_context)


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, nodes, w_out, ctx.implementation = inputs
    ctx.save_for_backward(h, nodes, w_out)


def _combine_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dh, dw = _combine_backward(dy.contiguous(), *ctx.saved_tensors, ctx.implementation)
    return dh, None, dw, None


combine_op.register_autograd(_combine_gradient, setup_context=_combine_context)


def _fff_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, w_out, bias, _, _, ctx.activation, ctx.route_gradient, ctx.implementation = inputs
    ctx.save_for_backward(x, w_in, w_out, *output[1:], *([] if bias is None else [bias]))
    ctx.set_materialize_grads(False)


def _fff_gradient(
    ctx: Any, dy: Tensor | None, dlogits: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    # h is made again from the logits: it costs one pass over visited nodes and saves one tensor
    x, w_in, w_out, logits, nodes, *bias = ctx.saved_tensors
    dw_out, total = None, dlogits
    if dy is not None:
        h = activate(logits, ctx.activation)
        dh, dw_out = _combine_backward(dy.contiguous(), h, nodes, w_out, ctx.implementation)
        total = activate_backward(logits, dh, ctx.activation, ctx.route_gradient)
        total = total if dlogits is None else total + dlogits
    if total is None:
        return (None,) * 9
    dx, dw_in, db = _walk_backward(
        total.contiguous(), nodes, x, w_in, bool(bias), ctx.implementation
    )
    return dx, dw_in, dw_out, db.to(bias[0].dtype) if bias else None, *(None,) * 5


fff_op.register_autograd(_fff_gradient, setup_context=_fff_context)
