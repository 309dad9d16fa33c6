"""The steps of an encoder that no BLAS has: native where the core is there, else numpy's oracle.

Both offer the same methods over float32 arrays. Legend: N tokens of all sequences, D hidden
size, H heads, M outputs and K inputs of a dense layer, B sequences.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.native import native
from nomatmul.formats.quantise import from_bfloat16, quantise_activation
from nomatmul.reference import encoder as oracle
from nomatmul.reference import fff, ops

Float = NDArray[np.float32]


class Steps(Protocol):
    """What the forward pass asks for."""

    name: str

    def add_norm(self, x: Float, delta: Float | None, norm: Norm) -> Float:
        """x += delta in place (None: nothing); return the norm of x."""
        ...

    def activate(self, x: Float, kind: str) -> Float:
        """Return gelu, silu or relu of x, which may be overwritten."""
        ...

    def attention(
        self, qkv: Float, offsets: NDArray[np.int64], seen: NDArray[np.uint8] | None, heads: int
    ) -> Float:
        """[N, D] of qkv [N, 3D]: every sequence offsets[b]..offsets[b + 1] on its own."""
        ...

    def float_layer(self, weight: Float) -> Any:
        """A function from x [N, K] to x W^T [N, M]."""
        ...

    def int8_layer(self, weight: NDArray[np.int8], scale: Float) -> Any:
        """A function from x [N, K] to x W^T [N, M], exact sums of int8 products."""
        ...

    def fff_layer(self, rows: fff.FFFRows) -> Any:
        """An object with forward(x, y, rows=None), as nomatmul._native.fff.Layer has it."""
        ...


class Norm:
    """A layer norm (weight and bias) or an RMS norm (bias None)."""

    def __init__(self, weight: Float, bias: Float | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps


class NativeSteps:
    """Steps by `nomatmul._native.encoder`; isa None takes the best instruction set.

    Every step gives a token the same bits whatever the other tokens and the threads are. That is
    why dense products are the core's own: a BLAS sums in an order that depends on the batch, and
    a last bit may turn a decision of a tree. docs/log.md compares their speeds.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        self._core = native()
        self._encoder = self._core.encoder
        self.threads, self._isa = threads, isa
        self.name = isa or self._core.kernels.isas()[0]

    def add_norm(self, x: Float, delta: Float | None, norm: Norm) -> Float:
        out = np.empty_like(x)
        self._encoder.add_norm(
            x, delta, norm.weight, norm.bias, norm.eps, out, self.threads, self._isa
        )
        return out

    def activate(self, x: Float, kind: str) -> Float:
        self._encoder.activate(x, kind, self.threads, self._isa)
        return x

    def attention(
        self, qkv: Float, offsets: NDArray[np.int64], seen: NDArray[np.uint8] | None, heads: int
    ) -> Float:
        out = np.empty((len(qkv), qkv.shape[1] // 3), np.float32)
        self._encoder.attention(qkv, offsets, seen, heads, out, self.threads, self._isa)
        return out

    def float_layer(self, weight: Float) -> Any:
        panels, outputs = self._encoder.float_panels(weight, self._isa), len(weight)

        def product(x: Float) -> Float:
            out = np.empty((len(x), outputs), np.float32)
            self._encoder.linear_f32(x, panels, out, self.threads, self._isa)
            return out

        return product

    def int8_layer(self, weight: NDArray[np.int8], scale: Float) -> Any:
        panels, outputs = self._encoder.panels(weight, self._isa), len(weight)

        def product(x: Float) -> Float:
            out = np.empty((len(x), outputs), np.float32)
            self._encoder.linear_int8(x, panels, scale, out, self.threads, self._isa)
            return out

        return product

    def fff_layer(self, rows: fff.FFFRows) -> Any:
        return self._core.fff.Layer(
            rows.form,
            rows.rows,
            rows.trees,
            rows.depth,
            rows.activation,
            scales=rows.scales,
            bias=rows.bias,
            threads=self.threads,
            isa=self._isa,
        )


class NumpySteps:
    """The same by the oracle: slow, for machines without the native core, and for tests."""

    name = "numpy"

    def add_norm(self, x: Float, delta: Float | None, norm: Norm) -> Float:
        if delta is not None:
            x += delta
        if norm.bias is None:
            y = ops.rms_norm(x, norm.weight, norm.eps)
        else:
            y = oracle.layer_norm(x, norm.weight, norm.bias, norm.eps)
        if not np.isfinite(y).all():
            raise ValueError("a value inside the model is not finite")
        return y

    def activate(self, x: Float, kind: str) -> Float:
        return oracle.ACTIVATIONS[kind](x)

    def attention(
        self, qkv: Float, offsets: NDArray[np.int64], seen: NDArray[np.uint8] | None, heads: int
    ) -> Float:
        out = np.empty((len(qkv), qkv.shape[1] // 3), np.float32)
        for first, last in itertools.pairwise(offsets):
            q, k, v = (
                part.reshape(1, last - first, heads, -1)
                for part in np.split(qkv[first:last], 3, axis=1)
            )
            open_S = np.ones(last - first, bool) if seen is None else seen[first:last] != 0
            allowed = np.broadcast_to(open_S, (1, len(open_S), len(open_S)))
            out[first:last] = ops.attend(q, k, v, allowed)[0]
        return out

    def float_layer(self, weight: Float) -> Any:
        return blas_layer(weight)

    def int8_layer(self, weight: NDArray[np.int8], scale: Float) -> Any:
        def product(x: Float) -> Float:
            q, step = quantise_activation(x)
            acc = q.astype(np.float64) @ weight.astype(np.float64).T
            return acc.astype(np.float32) * (scale * step)

        return product

    def fff_layer(self, rows: fff.FFFRows) -> Any:
        return _NumpyLayer(rows)


class _NumpyLayer:
    """An FFF by reference/fff.py, bit for bit what the native layer computes."""

    def __init__(self, rows: fff.FFFRows) -> None:
        if len(rows.rows) != rows.trees * rows.nodes:
            raise ValueError(
                f"{len(rows.rows)} rows, but {rows.trees} trees of depth {rows.depth} have"
                f" {rows.trees * rows.nodes}"
            )
        self._rows = rows

    def forward(self, x: Float, y: Float | None, rows: NDArray[np.int32] | None = None) -> None:
        result, _, path = fff.forward(self._rows, x)
        if y is not None:
            y[:] = result
        if rows is not None:
            rows[:] = path


def blas_layer(weight: Float) -> Any:
    """A function from x [N, K] to x W^T [N, M] by numpy's BLAS."""
    turned = weight.T  # a view: the BLAS reads it as it lies

    def product(x: Float) -> Float:
        return x @ turned

    return product


def expanded(stored: NDArray[Any]) -> Float:
    """float32 of a stored float tensor (bfloat16 comes as uint16 bits)."""
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored
