"""The conditional layer: the oracle's bits on every instruction set, thread count and batch.

Legend: N tokens, T trees, L levels, V rows, K = D hidden size.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from fff_backends import (
    F32,
    StoredTrees,
    native_fff,
    native_layer,
    oracle,
    random_layer,
    random_tokens,
    run,
    sparse_layer,
)
from numpy.typing import NDArray
from parity_backends import ISAS, native

from nomatmul.reference.activations import ACTIVATIONS

FORMS = ("f32", "bf16", "int8", "ternary")
# hidden, trees, depth, activation, tokens: one token, blocks, many trees, odd sizes, a lone root.
CASES = (
    (64, 1, 3, "gelu", 1),
    (129, 3, 4, "silu", 21),
    (70, 40, 2, "relu", 2),
    (200, 5, 0, "gelu", 17),
    (768, 2, 5, "gelu", 3),
    (1, 1, 1, "silu", 4),
    (300, 130, 0, "silu", 1),
)
# Enough of both for the batch to be sorted by paths (fff_batches.cc: 8 MiB a tree, 1024 tokens).
GROUPED = (("f32", 300, 1, 11), ("bf16", 200, 2, 13), ("int8", 300, 1, 13), ("ternary", 260, 2, 15))


@functools.cache
def expected(
    form: str, case: tuple[int, int, int, str, int]
) -> tuple[StoredTrees, F32, tuple[NDArray[np.generic], ...]]:
    """Return (layer, x, what the oracle gives); made once for all instruction sets."""
    hidden, trees, depth, activation, tokens = case
    layer = random_layer(form, hidden, trees, depth, activation)
    x_NK = random_tokens(layer, tokens)
    return layer, x_NK, oracle(layer)(x_NK)


def assert_same(
    ours: tuple[NDArray[np.generic], ...], theirs: tuple[NDArray[np.generic], ...]
) -> None:
    """Equal bits of y, logits and rows; the rows first, because the others follow from them."""
    for name, i in (("rows", 2), ("logits", 1), ("y", 0)):
        bits = (ours[i].view(np.int32), theirs[i].view(np.int32))
        np.testing.assert_array_equal(*bits, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_of_the_oracle(isa: str, form: str, case: tuple[int, int, int, str, int]) -> None:
    layer, x_NK, theirs = expected(form, case)
    for threads in (1, 3):
        assert_same(run(isa, layer, x_NK, threads), theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_ties_go_left(isa: str, form: str) -> None:
    """Sparse integers: a good part of the logits is exactly 0, of either sign."""
    layer = sparse_layer(form, 100, 3, 5)
    x_NK = np.random.default_rng(8).integers(-2, 3, (40, 100)).astype(np.float32)
    theirs = oracle(layer)(x_NK)
    zeros = np.count_nonzero(theirs[1] == 0)
    assert zeros > theirs[1].size // 10
    assert_same(run(isa, layer, x_NK), theirs)


@pytest.mark.parametrize(("form", "hidden", "trees", "depth"), GROUPED)
def test_sorted_by_path(form: str, hidden: int, trees: int, depth: int) -> None:
    """A large batch equals its tokens in small batches, on any number of threads."""
    layer = random_layer(form, hidden, trees, depth, "gelu")
    assert layer.rows[0].nbytes * layer.nodes > 2**23
    x_NK = random_tokens(layer, 1100)
    whole = run("scalar", layer, x_NK)
    parts = [run("scalar", layer, x_NK[at : at + 100]) for at in range(0, 1100, 100)]
    assert_same(whole, tuple(np.concatenate(part) for part in zip(*parts, strict=True)))
    some = x_NK[-7:]
    assert_same(tuple(part[-7:] for part in whole), oracle(layer)(some))
    for isa in native().isas():
        assert_same(run(isa, layer, x_NK, 2), whole)


@pytest.mark.parametrize("hidden", [700, 704])  # 704 = 11 * 64: floats need no padded copy
@pytest.mark.parametrize("form", FORMS)
def test_trees_are_shared_between_threads(form: str, hidden: int) -> None:
    """Few tokens and enough trees for fff_batches.cc to cut by trees (128 KiB of rows a batch)."""
    layer = random_layer(form, hidden, 256, 1, "gelu")
    x_NK = random_tokens(layer, 3)
    theirs = oracle(layer)(x_NK)
    assert layer.rows[0, 0].nbytes * 3 * 512 > 2**17
    for isa in native().isas():
        for threads in (1, 2, 4):
            assert_same(run(isa, layer, x_NK, threads), theirs)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["int8", "ternary"])
@pytest.mark.parametrize("isa", ISAS)
def test_largest_sums(isa: str, form: str, sign: int) -> None:
    """Every weight and every quantised value at its limit: no narrow sum on the way overflows."""
    layer = random_layer(form, 1024, 90, 1, "relu" if form == "int8" else "silu")
    layer.rows[:] = 0b10101010 if form == "ternary" else -128
    if form == "ternary":
        assert layer.norm_in is not None
        assert layer.norm_out is not None
        assert layer.scales is not None
        layer.norm_in[:] = layer.norm_out[:] = 1
        layer.scales[:] = 0.001  # logits near 1 or -1, where silu is not 0
    x_NK = np.full((5, 1024), sign, np.float32)
    assert_same(run(isa, layer, x_NK), oracle(layer)(x_NK))


def test_a_second_way_to_the_same_sums() -> None:
    """The oracle itself, against float64 and a walk written as the paper says it."""
    layer = random_layer("f32", 96, 2, 4, "gelu")
    x_NK = random_tokens(layer, 9)
    y_NK, logits, rows = oracle(layer)(x_NK)
    assert layer.bias is not None
    for n, x_K in enumerate(x_NK.astype(np.float64)):
        y_K = np.zeros(96)
        for tree in range(2):
            node = 0
            for level in range(5):
                row = tree * 31 + node
                assert rows[n, tree, level] == row
                logit = layer.rows[row, 0] @ x_K + layer.bias[row]
                assert abs(logits[n, tree, level] - logit) < 1e-4
                y_K += 0.5 * logit * math.erfc(-logit / math.sqrt(2)) * layer.rows[row, 1]
                node = 2 * node + (2 if logit > 0 else 1)
        np.testing.assert_allclose(y_NK[n], y_K, atol=2e-3)


def exact(activation: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the activation in float64."""
    if activation == "gelu":
        return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return np.maximum(x, 0)


# Relative errors: gelu as float_vectors.h states it, silu as test_float_steps.py derives it.
BOUNDS = {"gelu": 6e-7, "silu": 8 * 2.0**-24, "relu": 0.0}


@pytest.mark.parametrize("activation", BOUNDS)
def test_activations_are_right(activation: str) -> None:
    x = np.concatenate([np.linspace(-12.89, 12.89, 20011), np.geomspace(1e-30, 100, 999)])
    x_N = np.concatenate([x, -np.geomspace(1e-30, 12.8, 999)]).astype(np.float32)
    want = exact(activation, x_N.astype(np.float64))
    theirs = ACTIVATIONS[activation](x_N)
    assert (np.abs(theirs - want) <= BOUNDS[activation] * np.abs(want)).all()
    fff = native_fff()
    for isa in native().isas():
        h_N = np.full_like(x_N, np.nan)
        assert fff.activate(isa, activation, x_N, h_N)
        np.testing.assert_array_equal(h_N.view(np.int32), theirs.view(np.int32))
        far = np.array([-13, -1e4, -3e38, 3e38, 0.0, -0.0], np.float32)
        out = np.empty_like(far)
        assert fff.activate(isa, activation, far, out)
        limit = 3e-5 if activation == "silu" else 0  # silu(-13) is -2.9e-5
        np.testing.assert_allclose(out, np.maximum(far, 0), atol=limit)
        for bad in (np.nan, np.inf, -np.inf):
            assert not fff.activate(isa, activation, np.full(3, bad, np.float32), out[:3])


@pytest.mark.parametrize("form", FORMS)
def test_alone_equals_batched(form: str) -> None:
    layer = random_layer(form, 128, 4, 3, "gelu")
    x_NK = random_tokens(layer, 70)
    whole = run("scalar", layer, x_NK)
    for n in (0, 33, 69):
        assert_same(run("scalar", layer, x_NK[n : n + 1]), tuple(a[n : n + 1] for a in whole))


def test_nothing_to_do() -> None:
    layer = random_layer("f32", 64, 1, 2, "gelu")
    empty = np.empty((0, 64), np.float32)
    native_layer(layer).forward(empty, empty.copy())
