"""What is wrong with a conditional layer, or with its input, is said in a ValueError."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fff_backends import StoredTrees, native_fff, native_layer, oracle, random_layer, random_tokens

from nomatmul.engine.fff import FFFLayer, pack_rows

FORMS = ("f32", "bf16", "int8", "ternary")


def changed(base: str, **changes: Any) -> Any:
    """Build the native layer of a small good layer with some fields changed."""
    return native_layer(dataclasses.replace(random_layer(base, 96, 2, 2, "gelu"), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "14 rows, but 2 trees of depth 3 have 30"),
        ({"trees": 1}, "14 rows, but 1 trees of depth 2 have 7"),
        ({"trees": 0}, "trees is 0, expected at least 1"),
        ({"trees": -3}, "trees is -3"),
        ({"depth": -1}, "depth is -1, expected at least 0"),
        ({"depth": 29}, "2 trees of depth 29 have more rows than 1073741823"),
        ({"depth": 2**30}, "have more rows than 1073741823"),
        ({"trees": 2**30}, "1073741824 trees of depth 2 have more rows"),
        ({"activation": "tanh"}, 'activation "tanh" is unknown: gelu, silu, relu or relu2'),
        ({"form": "fp4"}, 'form "fp4" is unknown: f32, bf16, int8 or ternary'),
        ({"form": "bf16"}, "rows must be float32"),
        ({"bias": np.zeros(13, np.float32)}, "bias has 13 elements, expected 14"),
        ({"rows": np.zeros((14, 3, 96), np.float32)}, "input and output weights"),
        ({"rows": np.zeros((14, 2, 0), np.float32)}, "rows have no columns"),
        ({"scales": np.zeros(2, np.float32)}, "float rows have no scales"),
        ({"eps": -1.0}, "eps must not be negative"),
    ],
)
def test_layers_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed("f32", **changes)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("int8", {"scales": None}, r"int8 rows need scales \[rows, 2\]"),
        ("int8", {"scales": np.zeros((13, 2), np.float32)}, "int8 rows need scales"),
        ("ternary", {"scales": np.zeros((14, 2), np.float32)}, r"ternary rows need scales \[2\]"),
        ("ternary", {"norm_in": None}, "ternary rows need norm_in and norm_out"),
        ("ternary", {"norm_out": None}, "ternary rows need norm_in and norm_out"),
        ("ternary", {"norm_out": np.ones(7, np.float32)}, "norm_out has 7 elements, expected 14"),
        ("ternary", {"norm_in": np.ones(200, np.float32)}, "32 bytes; 200 values need 64"),
        ("ternary", {"rows": np.full((14, 2, 32), 255, np.uint8)}, "an illegal code"),
        ("ternary", {"bias": np.zeros(14, np.float32)}, "ternary rows have no bias"),
    ],
)
def test_scales_and_norms(form: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(form, **changes)


def test_arrays_of_a_call() -> None:
    layer = changed("f32")
    x = np.zeros((3, 96), np.float32)
    with pytest.raises(ValueError, match="x has 95 columns, the layer 96"):
        layer.forward(np.zeros((3, 95), np.float32), None)
    with pytest.raises(ValueError, match="y must have the shape of x"):
        layer.forward(x, np.zeros((2, 96), np.float32))
    with pytest.raises(ValueError, match="rows must be"):
        layer.forward(x, x.copy(), np.zeros((3, 2, 4), np.int32))
    with pytest.raises(ValueError, match="x and y must not overlap"):
        layer.forward(x, x)
    with pytest.raises(ValueError, match="x and y must not overlap"):
        layer.forward(x[1:], x[:-1])
    for outputs in ((x.astype(np.float64),), (None, np.zeros((3, 2, 3), np.int64))):
        with pytest.raises(TypeError):  # a converted copy would take the results with it
            layer.forward(x, *outputs)
    with pytest.raises(ValueError, match="a layer is None"):
        native_fff().time_forward([None], x[None], 1)
    with pytest.raises(ValueError, match="threads is 0, expected 1 to 1024"):
        native_layer(random_layer("f32", 96, 2, 2, "gelu"), None, 0).forward(x, x.copy())
    with pytest.raises(ValueError, match='isa "sse9" is not available here'):
        native_layer(random_layer("f32", 96, 2, 2, "gelu"), "sse9")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_not_finite(form: str, bad: float) -> None:
    """One bad value in one token, for each way in which a batch is cut; the token is named."""
    for trees, depth, tokens, threads in ((2, 3, 30, 2), (600, 0, 2, 2), (1, 12, 1030, 1)):
        hidden = 70 if tokens < 1000 else 300
        layer = random_layer(form, hidden, trees, depth, "gelu")
        x_NK = random_tokens(layer, tokens)
        x_NK[tokens - 1, hidden // 2] = bad
        built = native_layer(layer, None, threads)
        with pytest.raises(ValueError, match=f"of token {tokens - 1} are not finite"):
            built.forward(x_NK, np.empty_like(x_NK))
        with pytest.raises(ValueError, match="finite"), np.errstate(invalid="ignore"):
            oracle(layer)(x_NK[-1:])
        good = np.empty_like(x_NK[:-1])  # and the layer is none the worse for it
        built.forward(x_NK[:-1], good)
        assert np.isfinite(good).all()


def test_the_wrapper() -> None:
    rng = np.random.default_rng(5)
    w_in, w_out = rng.standard_normal((2, 7, 33)).astype(np.float32)
    x_ND = rng.standard_normal((4, 33)).astype(np.float32)
    for form in ("f32", "bf16", "int8"):
        rows, scales = pack_rows(w_in, w_out, form)
        y_ND, paths = FFFLayer(form, rows, 1, 2, scales=scales).with_paths(x_ND.astype(np.float64))
        theirs = oracle(StoredTrees(form, rows, 1, 2, 33, scales=scales))(x_ND)
        for ours, expected in zip((y_ND, paths.logits, paths.rows), theirs, strict=True):
            np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(FFFLayer(form, rows, 1, 2, scales=scales)(x_ND), y_ND)
    with pytest.raises(ValueError, match="form 'f16' is unknown"):
        pack_rows(w_in, w_out, "f16")
    with pytest.raises(ValueError, match="differ in shape"):
        pack_rows(w_in, w_out[:3], "f32")
    with pytest.raises(ValueError, match=r"rows must be \[V, 2, columns\]"):
        FFFLayer("f32", w_in, 1, 2)
    rows, _ = pack_rows(w_in, w_out, "f32")
    with pytest.raises(ValueError, match=r"x has shape \[33\], expected 2 dimensions"):
        FFFLayer("f32", rows, 1, 2)(x_ND[0])
    with pytest.raises(ValueError, match=r"bias has shape \[7, 1\], expected 1 dimensions"):
        FFFLayer("f32", rows, 1, 2, bias=np.zeros((7, 1), np.float32))
    with pytest.raises(ValueError, match="no 32-bit index can name"):
        FFFLayer("f32", pack_rows(w_in, w_out, "f32")[0], 1, 2**40)


def test_paths_out_of_range() -> None:
    fff = native_fff()
    h, w, y = np.ones((2, 3), np.float32), np.ones((5, 4), np.float32), np.ones((2, 4), np.float32)
    for row in (-1, 5, 2**31 - 1):
        rows = np.zeros((2, 3), np.int32)
        rows[1, 2] = row
        with pytest.raises(ValueError, match=r"a row index is outside 0 \.\. 4"):
            fff.combine(h, rows, w, y, 1)
        with pytest.raises(ValueError, match="a row index is outside"):
            fff.gather_dot(y, rows, w, h.copy(), 1)
        with pytest.raises(ValueError, match="a row index is outside"):
            fff.segment_sum(h, rows, y, w.copy(), None, 1)
    good = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="differ in shape"):
        fff.combine(h, good[:, :2].copy(), w, y, 1)
    with pytest.raises(ValueError, match="sums has 4 elements, expected 5"):
        fff.segment_sum(h, good, y, w.copy(), np.zeros(4, np.float32), 1)
