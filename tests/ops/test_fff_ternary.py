"""The ternary FFF: whole numbers equal to the oracle's, straight-through gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nomatmul.formats.quantise import quantise_weight
from nomatmul.ops.bitlinear import new_slot, ternary_cache
from nomatmul.ops.fff import activate_routed, masked, native
from nomatmul.ops.fff.ternary import ternary_fff
from nomatmul.reference.trees import TernaryTrees

ON_CPU = ["naive", *(["native"] if native.available() else [])]
SLOTS = (new_slot(), new_slot())


def problem(tokens, width, out, trees, depth, dtype=torch.float64, seed=0):
    """Random (x, w_in, w_out, norm_in, norm_out), all with gradients."""
    torch.manual_seed(seed)
    rows = trees * (2 ** (depth + 1) - 1)
    shapes = [(tokens, width), (rows, width), (rows, out)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors += [1 + 0.3 * torch.randn(size, dtype=dtype) for size in (width, rows)]
    return [t.requires_grad_() for t in tensors]


def run(operands, trees, depth, implementation=None, **options):
    return ternary_fff(
        *operands, trees=trees, depth=depth, slots=SLOTS, implementation=implementation, **options
    )


def gradients(result, operands):
    y, logits, _ = result
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return torch.autograd.grad((y.sin() * y).sum() + (weight * logits).sum(), operands)


@pytest.mark.parametrize("name", [None, "masked", *ON_CPU])
@pytest.mark.parametrize(("trees", "depth"), [(1, 0), (1, 6), (5, 2)])
def test_integers_paths_and_logits_equal_the_oracle(name, trees, depth):
    operands = problem(17, 24, 24, trees, depth, torch.float32)
    with torch.no_grad():
        operands[0][3] = 0  # a token of zeros: every decision is a tie
    x, w_in, w_out, norm_in, norm_out = (t.detach().numpy() for t in operands)
    (t_in, scale_in), (t_out, scale_out) = quantise_weight(w_in), quantise_weight(w_out)
    scales = np.array([scale_in, scale_out], dtype=np.float32)
    norms = (norm_in, norm_out)
    oracle = TernaryTrees(trees, depth, "silu", t_in, t_out, scales, *norms, 1e-6)
    expected_y, expected_logits, rows = oracle(x)

    y, logits, nodes = run(operands, trees, depth, name)
    assert np.array_equal(nodes.numpy(), rows)
    assert np.array_equal(logits.detach().numpy(), expected_logits)
    # silu's last bits differ; no int8 value of these seeds lies that close to a tie
    np.testing.assert_allclose(y.detach().numpy(), expected_y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("trees", "depth"), [(1, 0), (1, 4), (3, 2)])
@pytest.mark.parametrize("full", [False, True])
def test_gradients_equal_the_masked_form(route, activation, trees, depth, full):
    operands = problem(9, 6, 5, trees, depth)
    options = {"activation": activation, "route_gradient": route, "full_precision": full}
    want = run(operands, trees, depth, "masked", **options)
    got = run(operands, trees, depth, None, **options)
    pairs = [
        *zip(got, want, strict=True),
        *zip(gradients(got, operands), gradients(want, operands), strict=True),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def written_out(operands, trees, depth, route, full):
    """The layer as a dense product of values that are rounded behind autograd's back."""
    x, w_in, w_out, norm_in, norm_out = operands

    def rounded(y, units, step):
        return y + (units * step - y).detach()

    def int8(y):
        step = y.abs().amax(-1, keepdim=True) / 127
        return rounded(y, (y / step).round(), step)

    def ternary(w):
        if full:
            return w
        w_scale = w.abs().mean()
        return rounded(w, (w / w_scale).round().clamp(-1, 1), w_scale)

    y = int8(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_in)
    all_logits = y @ ternary(w_in).T
    nodes = masked.visited(all_logits, trees, depth)
    logits = all_logits.gather(1, nodes.flatten(1)).view(nodes.shape)
    h = activate_routed(logits, "silu", route).flatten(1)
    z = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_out[nodes.flatten(1)]
    return torch.einsum("na,nad->nd", int8(z), ternary(w_out)[nodes.flatten(1)]), logits, nodes


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("route", [False, True])
def test_gradients_are_straight_through(route, full):
    """full: of weights that are not rounded, the gradients of the product that they are."""
    operands = problem(9, 6, 5, 3, 2, seed=3)
    want = written_out(operands, 3, 2, route, full)
    got = run(operands, 3, 2, route_gradient=route, full_precision=full)
    pairs = [
        *zip(got[:2], want[:2], strict=True),
        *zip(gradients(got, operands), gradients(want, operands), strict=True),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_bfloat16_walks_the_same_paths_and_sums_the_same_integers():
    operands = [t.detach() for t in problem(33, 48, 48, 4, 3, torch.float32)]
    x = operands[0].bfloat16()
    want = run([x.float(), *operands[1:]], 4, 3)
    got = run([x, *operands[1:]], 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        also = run([x.float(), *operands[1:]], 4, 3)
    for result in (got, also):
        for a, b in zip(result, want, strict=True):
            assert torch.equal(a, b)


def test_ternary_weights_are_kept_from_pass_to_pass():
    operands = problem(4, 6, 6, 2, 2, torch.float32)
    want = run(operands, 2, 2)[0]
    with ternary_cache() as cache:
        run(operands, 2, 2)
        assert len(cache) == 2
        assert torch.equal(run(operands, 2, 2)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_keep_what_they_promise_to_the_compiler(dtype):
    """Schemas (nothing is changed or aliased) and the shapes and types of their fake forms."""
    x, w_in, w_out, norm_in, norm_out = (t.detach() for t in problem(5, 6, 4, 2, 2, dtype))
    bias, shape = torch.randn(14, dtype=dtype), (2, 2)
    calls = torch.ops.nomatmul
    logits, nodes = calls.fff_walk(x, w_in, bias, *shape, "naive")
    q, step = calls.fff_quantize(x, norm_in, 1e-6, dtype)
    options = 1e-6, "silu", True, "naive"
    h, step_h = calls.fff_hidden(logits, nodes, norm_out, *options)
    y = calls.fff_combine(h, nodes, w_out, "naive")
    arguments = {
        "fff_walk": (x, w_in, bias, *shape, "naive"),
        "fff_walk_backward": (logits, nodes, x, w_in, True, "naive"),
        "fff_combine": (h, nodes, w_out, "naive"),
        "fff_combine_backward": (y, h, nodes, w_out, "naive"),
        "fff": (x, w_in, w_out, None, *shape, "gelu", False, "naive"),
        "fff_quantize": (x, norm_in, 1e-6, dtype),
        "fff_quantize_backward": (q, x, norm_in, step, 1e-6),
        "fff_hidden": (logits, nodes, norm_out, *options),
        "fff_hidden_backward": (h, logits, nodes, norm_out, step_h, *options),
    }
    for name, values in arguments.items():
        operator = getattr(calls, name).default
        torch.library.opcheck(operator, values, test_utils=("test_schema", "test_faketensor"))


def test_compiled_layers_are_compiled_once_while_weights_and_cache_change():
    """Layers of one shape share the code: slots, entries and versions of weights are no guards."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    layers = [problem(3, 6, 6, 2, 2, torch.float32, seed) for seed in range(2)]
    slots = [(new_slot(), new_slot()) for _ in layers]

    def layer(operands, own):
        return ternary_fff(*operands, trees=2, depth=2, slots=own, implementation="masked")[0]

    compiled = torch.compile(layer, backend=counter, dynamic=False)
    with ternary_cache() as cache:
        for _ in range(3):
            for operands, own in zip(layers, slots, strict=True):
                got, want = compiled(operands, own), layer(operands, own)
                assert torch.equal(got, want)
                with torch.no_grad():
                    operands[1].mul_(1.1).add_(0.01)
            cache.clear()
    assert counter.frame_count == 1
