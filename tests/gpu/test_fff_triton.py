"""FFF's Triton kernels on a GPU: paths, values and every gradient against float64.

Inputs and incoming weights are small whole numbers, so logits are exact, many of them are ties at
zero, and paths must be equal node for node.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import error, poisoned
from machine import need_triton

from nomatmul.ops import fff

pytestmark = pytest.mark.gpu
need_triton()
from nomatmul.ops.fff import triton as kernels  # noqa: E402  (needs triton)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Sums in float32; 16 bit operands: four roundings of 2^-8 on the way."""

SHAPES = [  # trees, depth, inputs, outputs
    (1, 0, 64, 96),
    (1, 1, 96, 64),
    (1, 6, 96, 96),
    (1, 7, 64, 64),
    (1, 11, 768, 768),
    (1, 12, 64, 96),
    (1, 14, 96, 64),
    (3, 2, 64, 96),
    (3, 7, 96, 96),
    (16, 6, 96, 64),
    (128, 3, 768, 768),
]


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    """A kernel that cannot run is an error here, not a fallback."""
    monkeypatch.setenv("NOMATMUL_OPS", "triton")
    torch.manual_seed(1)


def _far(ours, expected):
    """Error relative to the norm, or to 1: one token may visit activations near zero only."""
    gap = (ours.double() - expected).norm() / expected.norm().clamp(min=1.0)
    return float(gap) if bool(gap == gap) else float("inf")


def _force(monkeypatch, form):
    tokens = 1 if form == "tiles" else 1 << 30
    monkeypatch.setattr(kernels, "DEEP_FROM", tokens)
    monkeypatch.setattr(kernels, "SHALLOW_FROM", tokens)


def _whole(low, high, *shape):
    return torch.randint(low, high + 1, shape, device="cuda", dtype=torch.float64)


def _inputs(trees, depth, inputs, outputs, tokens, dtype):
    """x, w_in, w_out, bias, dy in float64, each value one of `dtype`'s."""
    rows = trees * (2 ** (depth + 1) - 1)
    w_out = torch.randn(rows, outputs, device="cuda").to(dtype).double()
    dy = torch.randn(tokens, outputs, device="cuda").to(dtype).double()
    x, w_in = _whole(-3, 3, tokens, inputs), _whole(-1, 1, rows, inputs)
    return x, w_in, w_out, _whole(-2, 2, rows), dy


def _run(values, dtype, shape, implementation, call=fff.fff, **options):
    x, w_in, w_out, bias, dy = (v.to(dtype).requires_grad_() for v in values)
    leaves = [x, w_in, w_out, bias]
    y, logits, nodes = call(
        *leaves, trees=shape[0], depth=shape[1], implementation=implementation, **options
    )
    loss = (y * dy.detach()).sum(dtype=torch.float64) + logits.sum(dtype=torch.float64) * 0.01
    return [y, logits, *torch.autograd.grad(loss, leaves)], nodes


@pytest.mark.parametrize("form", ["gather", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_and_gradients_equal_the_masked_form(monkeypatch, shape, dtype, form):
    _force(monkeypatch, form)
    for tokens in (127, 129, 1):
        values = _inputs(*shape, tokens, dtype)
        expected, path = _run(values, torch.float64, shape, "masked")
        with poisoned():
            ours, nodes = _run(values, dtype, shape, "triton")
        assert torch.equal(nodes, path)
        assert torch.equal(ours[1].double(), expected[1])
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == (torch.float32 if a is ours[1] else dtype)
            assert _far(a, b) < BOUND[dtype]


@pytest.mark.parametrize("form", ["gather", "tiles"])
@pytest.mark.parametrize(("activation", "route"), [("silu", True), ("relu", False)])
def test_activations_and_the_gradient_to_decisions(monkeypatch, activation, route, form):
    _force(monkeypatch, form)
    shape = (3, 7, 64, 96)
    values = _inputs(*shape, 129, torch.float32)
    options = {"activation": activation, "route_gradient": route}
    expected, path = _run(values, torch.float64, shape, "masked", **options)
    ours, nodes = _run(values, torch.float32, shape, "triton", **options)
    assert torch.equal(nodes, path)
    assert all(error(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("form", ["gather", "tiles"])
@pytest.mark.parametrize("shape", [(1, 11), (16, 6)])
def test_walk_and_combine_are_exact_on_whole_numbers(monkeypatch, shape, form):
    """What a ternary layer asks for: int8 activations and ternary rows, in bf16."""
    _force(monkeypatch, form)
    trees, depth = shape
    rows = trees * (2 ** (depth + 1) - 1)
    x, w_in = _whole(-128, 127, 129, 96), _whole(-1, 1, rows, 96)
    x[0] = 0  # every logit a tie: left, left, left
    logits, nodes = fff.walk(
        x.bfloat16(), w_in.bfloat16(), trees=trees, depth=depth, implementation="triton"
    )
    expected, path = fff.walk(x, w_in, trees=trees, depth=depth, implementation="masked")
    assert torch.equal(nodes, path)
    assert torch.equal(logits.double(), expected)
    assert torch.equal(nodes[0, 0].cpu(), 2 ** torch.arange(depth + 1, dtype=torch.int32) - 1)
    h, w_out = _whole(-128, 127, *nodes.shape), _whole(-1, 1, rows, 64)
    y = fff.combine(h.float(), nodes, w_out.bfloat16(), implementation="triton")
    assert y.dtype == torch.float32
    assert torch.equal(y.double(), fff.combine(h, path, w_out, implementation="masked"))


def test_every_token_on_one_path_and_no_token_at_all():
    shape = (1, 11, 64, 64)
    values = list(_inputs(*shape, 5000, torch.float32))
    values[0] = values[0][:1].expand(5000, -1)
    expected, path = _run(values, torch.float64, shape, "naive")
    ours, nodes = _run(values, torch.float32, shape, "triton")
    assert torch.equal(nodes, path)
    assert all(error(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))
    empty, nodes = _run(_inputs(*shape, 0, torch.float32), torch.float32, shape, "triton")
    assert nodes.shape == (0, 1, 12)
    assert all(not bool(part.any()) for part in empty)


@pytest.mark.parametrize("shape", [(1, 11, 96, 96), (16, 6, 96, 96)])
def test_same_bits_in_every_run(shape):
    values = _inputs(*shape, 3000, torch.bfloat16)
    values[0].normal_()
    first, _ = _run(values, torch.bfloat16, shape, "triton")
    again, _ = _run(values, torch.bfloat16, shape, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_torch_compile_takes_the_layer_whole_and_autocast_lowers_it():
    shape = (1, 11, 96, 96)
    values = _inputs(*shape, 2100, torch.bfloat16)
    expected, path = _run(values, torch.float64, shape, "masked")
    with torch.autocast("cuda", torch.bfloat16):
        compiled = torch.compile(fff.fff, fullgraph=True)
        ours, nodes = _run(values, torch.float32, shape, "triton", call=compiled)
    assert torch.equal(nodes, path)
    assert ours[0].dtype == torch.bfloat16
    assert all(error(a, b) < BOUND[torch.bfloat16] for a, b in zip(ours, expected, strict=True))
