"""FFF operations: conditional against masked, values, gradients and paths; bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nomatmul.ops import choose
from nomatmul.ops.fff import activate_routed, combine, fff, masked, naive, native, walk
from nomatmul.ops.fff.surrogate import activate_backward

ON_CPU = ["naive", *(["native"] if native.available() else [])]


def problem(tokens, width, out, trees, depth, bias=True, dtype=torch.float64, seed=0):
    """Random (x, w_in, w_out, bias or None), all with gradients."""
    torch.manual_seed(seed)
    rows = trees * (2 ** (depth + 1) - 1)
    shapes = [(tokens, width), (rows, width), (rows, out)] + ([(rows,)] if bias else [])
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors if bias else [*tensors, None]


def with_gradients(operands, implementation, **options):
    """(y, logits, rows, gradient of each operand) of a loss that reads y and the logits."""
    y, logits, rows = fff(*operands, implementation=implementation, **options)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    loss = (y.sin() * y).sum() + (weight * logits.square()).sum()
    leaves = [t for t in operands if t is not None]
    return y, logits, rows, *torch.autograd.grad(loss, leaves)


def assert_same(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("route", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("trees", "depth"), [(1, 0), (1, 5), (4, 0), (3, 2)])
def test_values_and_gradients_equal_the_masked_form(activation, route, bias, trees, depth):
    operands = problem(11, 5, 7, trees, depth, bias)
    options = {"trees": trees, "depth": depth, "activation": activation, "route_gradient": route}
    want = with_gradients(operands, "masked", **options)
    assert_same(with_gradients(operands, None, **options), want)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 6),
    out=st.integers(1, 6),
    trees=st.integers(1, 4),
    depth=st.integers(0, 4),
    route=st.booleans(),
    bias=st.booleans(),
)
def test_any_shape_equals_the_masked_form(tokens, width, out, trees, depth, route, bias):
    operands = problem(tokens, width, out, trees, depth, bias, seed=tokens)
    options = {"trees": trees, "depth": depth, "route_gradient": route}
    want = with_gradients(operands, "masked", **options)
    assert_same(with_gradients(operands, "naive", **options), want)


def test_walk_and_combine_apart_equal_the_whole():
    x, w_in, w_out, bias = problem(6, 4, 3, 2, 3)
    logits, rows = walk(x, w_in, bias, trees=2, depth=3)
    y = combine(activate_routed(logits, "gelu", True), rows, w_out)
    whole = fff(x, w_in, w_out, bias, trees=2, depth=3, route_gradient=True)
    assert_same((y, logits, rows), whole)
    leaves = (x, w_in, w_out, bias)
    apart = torch.autograd.grad((y.cos().sum() + logits.sin().sum()), leaves)
    y, logits, _ = whole
    assert_same(apart, torch.autograd.grad((y.cos().sum() + logits.sin().sum()), leaves))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gradients_equal_differences(activation):
    operands = problem(4, 3, 2, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *t: fff(*t, trees=2, depth=2, activation=activation)[:2], operands
    )


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("route", [False, True])
def test_closed_gradient_of_the_activation_equals_autograd(activation, route):
    torch.manual_seed(2)
    logits = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    d = torch.randn_like(logits)
    (want,) = torch.autograd.grad(activate_routed(logits, activation, route), logits, d)
    got = activate_backward(logits.detach(), d, activation, route)
    torch.testing.assert_close(got, want)


def test_route_gradient_changes_no_value_and_moves_every_deciding_logit():
    logits = torch.randn(50, 3, 4, requires_grad=True)
    plain, routed = (activate_routed(logits, "gelu", route) for route in (False, True))
    assert torch.equal(plain, routed)
    d = torch.ones_like(logits)
    (without,) = torch.autograd.grad(plain, logits, d)
    (with_,) = torch.autograd.grad(routed, logits, d)
    assert torch.equal(without[..., -1], with_[..., -1])  # the last level decides nothing
    assert (without[..., :-1] != with_[..., :-1]).all()


# -- paths -----------------------------------------------------------------------------------------


def path_of(x, w_in, trees, depth):
    """The definition, in whole numbers, one token and one tree at a time."""
    nodes = 2 ** (depth + 1) - 1
    paths = []
    for row in x.tolist():
        for tree in range(trees):
            j = 0
            for _ in range(depth + 1):
                paths.append(tree * nodes + j)
                logit = sum(a * b for a, b in zip(row, w_in[paths[-1]].tolist(), strict=True))
                j = 2 * j + (2 if logit > 0 else 1)
    return torch.tensor(paths, dtype=torch.int32).view(len(x), trees, depth + 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 40), st.integers(0, 99))
def test_paths_of_whole_numbers_are_exact_with_ties(trees, depth, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = trees * (2 ** (depth + 1) - 1)
    # few different values and many zeros: about one logit in five is exactly 0
    w_in = torch.randint(-1, 2, (rows, width), generator=generator).float()
    x = torch.randint(-2, 3, (9, width), generator=generator).float()
    x[0], x[1] = 0, -0.0
    want = path_of(x, w_in, trees, depth)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name in (None, "masked", *ON_CPU):
            _, got = walk(
                x.to(dtype), w_in.to(dtype), trees=trees, depth=depth, implementation=name
            )
            assert torch.equal(got, want)


def test_whole_numbers_of_ternary_layers_are_exact_in_bfloat16():
    torch.manual_seed(0)
    q = torch.randint(-128, 128, (5, 3000)).float()
    t = torch.randint(-1, 2, (7, 3000)).float()
    want, rows = masked.walk(q.double(), t.double(), None, 1, 2)
    for name in (None, *ON_CPU):
        logits, got = walk(q.bfloat16(), t.bfloat16(), trees=1, depth=2, implementation=name)
        assert torch.equal(logits.double(), want)
        assert torch.equal(got, rows)
        h = torch.randint(-128, 128, rows.shape).float()
        y = combine(h, rows, t.bfloat16(), implementation=name)
        assert torch.equal(y.double(), masked.combine(h.double(), rows, t.double()))


@pytest.mark.parametrize("name", ON_CPU)
def test_float32_is_close_to_float64(name):
    """Bound: three passes of sums over at most 64 terms of size about 1, 2^-24 a rounding."""
    exact = problem(33, 16, 12, 3, 3)
    options = {"trees": 3, "depth": 3, "route_gradient": True}
    want = with_gradients(exact, "masked", **options)
    got = with_gradients([t.detach().float().requires_grad_() for t in exact], name, **options)
    assert torch.equal(got[2], want[2])
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.double().norm()


# -- what is not made ------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the greatest number of elements that an operator of torch returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_nothing_of_tokens_by_nodes_is_made(monkeypatch):
    monkeypatch.setattr(naive, "_SLICE", 1000)
    tokens, width, trees, depth = 200, 8, 2, 9
    x, w_in, w_out, bias = (
        t.detach() for t in problem(tokens, width, width, trees, depth, dtype=torch.float32)
    )
    rows = len(w_in)
    with Largest() as seen:
        logits, nodes = naive.walk(x, w_in, bias, trees, depth)
        y = naive.combine(logits, nodes, w_out)
        naive.walk_backward(logits, nodes, x, w_in, True)
        naive.combine_backward(y, logits, nodes, w_out)
    assert seen.elements <= rows * width  # a weight gradient
    assert rows * width < tokens * rows / 20
    with Largest() as dense:
        masked.fff(x, w_in, w_out, bias, trees, depth, "gelu", False)
    assert dense.elements == tokens * rows


def test_slices_of_tokens_change_nothing(monkeypatch):
    operands = problem(23, 5, 4, 2, 3)
    want = with_gradients(operands, "naive", trees=2, depth=3)
    monkeypatch.setattr(naive, "_SLICE", 30)
    assert_same(with_gradients(operands, "naive", trees=2, depth=3), want)


# -- types, compilation, bad input -----------------------------------------------------------------


def test_types_follow_operands_and_autocast():
    operands = problem(5, 4, 3, 2, 1, dtype=torch.float32)
    half = [t.detach().bfloat16().requires_grad_() for t in operands]
    y, logits, rows, *gradients = with_gradients(half, None, trees=2, depth=1)
    assert (y.dtype, logits.dtype, rows.dtype) == (torch.bfloat16, torch.float32, torch.int32)
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logits, rows, *gradients = with_gradients(operands, None, trees=2, depth=1)
    assert (y.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert {g.dtype for g in gradients} == {torch.float32}
    lowered = [t.detach().bfloat16() for t in operands[:3]]
    want, _, _ = fff(*lowered, operands[3].detach(), trees=2, depth=1)
    assert torch.equal(y, want)


def test_compiles_without_a_graph_break():
    operands = problem(5, 4, 3, 2, 2, dtype=torch.float32)

    def run(*tensors):
        y, logits, _ = fff(*tensors, trees=2, depth=2, route_gradient=True)
        h = activate_routed(logits, "silu", True)
        z, rows = walk(y[:, :1].expand(-1, 4), tensors[1], trees=2, depth=2)
        return y.sum() + combine(h, rows, tensors[2]).square().sum() + z.sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(run(*operands), operands)
    assert_same(torch.autograd.grad(compiled(*operands), operands), want)


@pytest.mark.parametrize("name", [None, "masked", *ON_CPU])
def test_nan_is_an_error(name):
    x, w_in, w_out, bias = problem(5, 4, 3, 1, 2, dtype=torch.float32)
    x = x.detach().clone()
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"logit.* (NaN|not finite)"):
        fff(x, w_in, w_out, bias, trees=1, depth=2, implementation=name)
    with pytest.raises(ValueError, match=r"logit.* (NaN|not finite)"):
        walk(x, w_in, bias, trees=1, depth=2, implementation=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"2 trees of depth 3 have 30 nodes, w_in has shape \(14, 4\)"),
        ({"depth": -1}, r"depth is -1, it must lie in 0\.\.24"),
        ({"depth": 25}, r"depth is 25, it must lie in 0\.\.24"),
        ({"trees": 0}, "trees is 0, it must be at least 1"),
        ({"activation": "tanh"}, "activation 'tanh' is not known: use one of gelu, silu, relu"),
        ({"implementation": "cuda"}, "implementation 'cuda' is not known"),
    ],
)
def test_bad_options_are_named(change, message):
    operands = problem(2, 4, 3, 2, 2)
    with pytest.raises(ValueError, match=message):
        fff(*operands, **{"trees": 2, "depth": 2, **change})


def test_bad_shapes_are_named():
    x, w_in, w_out, bias = problem(2, 4, 3, 2, 2)
    shape = {"trees": 2, "depth": 2}
    with pytest.raises(ValueError, match=r"x must be \[N, 4\], got \(2, 3\)"):
        fff(x[:, :3], w_in, w_out, bias, **shape)
    with pytest.raises(ValueError, match=r"bias must be \[14\], got \(13,\)"):
        fff(x, w_in, w_out, bias[1:], **shape)
    with pytest.raises(ValueError, match=r"w_out must be \[14, D\], got \(13, 3\)"):
        fff(x, w_in, w_out[1:], bias, **shape)
    logits, rows = walk(x, w_in, **shape)
    with pytest.raises(ValueError, match="must have one shape"):
        combine(logits[1:], rows, w_out)
    with pytest.raises(ValueError, match=r"w_out must be \[V, D\]"):
        combine(logits, rows, w_out[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_inference_on_a_cpu_has_the_bits_of_training(bias, activation):
    torch.manual_seed(2)
    rows = 3 * 15
    x, w_in, w_out = torch.randn(5, 12), torch.randn(rows, 12), torch.randn(rows, 9)
    b = torch.randn(rows) if bias else None
    options = {"trees": 3, "depth": 3, "activation": activation, "implementation": "native"}
    w_in.requires_grad_(True)
    trained = fff(x, w_in, w_out, b, **options)
    assert not native.infers("native", x, w_in, w_out, b)
    assert trained[0].requires_grad
    with torch.no_grad():
        assert native.infers("native", x, w_in, w_out, b)
        served = fff(x, w_in, w_out, b, **options)
        some = fff(x[:, ::2].repeat(1, 2)[:0], w_in, w_out, b, **options)
        strided = fff(x.t().contiguous().t(), w_in, w_out, b, **options)
        compiled = torch.compile(fff, fullgraph=True, backend="eager")(x, w_in, w_out, b, **options)
    for other in (trained, strided, compiled):
        assert all(torch.equal(a, c.detach()) for a, c in zip(served, other, strict=True))
    assert some[0].shape == (0, 9)
    with torch.no_grad(), pytest.raises(ValueError, match=r"finite|NaN"):
        fff(x * float("nan"), w_in, w_out, b, **options)
    for odd in (x.double(), x.half()):
        assert not native.infers("", odd, w_in, w_out, b)
    assert not native.infers("naive", x, w_in, w_out, b)


def test_a_kernel_that_does_not_compile_gives_way_to_plain_pytorch(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    x, w_in, w_out = torch.randn(5, 6), torch.randn(14, 6), torch.randn(14, 4)
    options = {"trees": 2, "depth": 2}
    want = fff(x, w_in, w_out, implementation="naive", **options)
    monkeypatch.setattr(choose, "_fallback_reason", None)
    monkeypatch.setattr(choose, "triton_wanted", lambda _: True)
    monkeypatch.setitem(choose._found, ("nomatmul.ops.fff.triton", "fff"), broken)
    w_in.requires_grad_()
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        got = fff(x, w_in, w_out, **options)
    torch.testing.assert_close(got, want)
