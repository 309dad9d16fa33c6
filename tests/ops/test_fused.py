"""Fused sublayers and loss on the CPU: hand-written gradients against autograd in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from straight_through import bit_linear, rms_norm
from torch import Tensor

from nomatmul.ops import choose, fused
from nomatmul.ops.bitlinear import new_slot, steps, ternary_cache, ternary_weights
from nomatmul.ops.fused.parts import product
from nomatmul.ops.loss import chunked_cross_entropy, linear_cross_entropy
from nomatmul.ops.mlgru import mlgru_recurrent, naive

EPS = (1e-6, 1e-5, 1e-4)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def mixer_reference(x, norm, weights, norms, gate, bound, full):
    y = rms_norm(x, norm, EPS[0])
    pairs = zip(weights[:3], norms[:3], strict=True)
    i, f, g = (bit_linear(y, w, n, EPS[1], full) for w, n in pairs)
    f = torch.sigmoid(f)
    if bound is not None:
        f = bound + (1 - bound) * f
    h, _ = mlgru_recurrent(F.silu(i) * (1 - f), f)
    mixed = rms_norm(g, gate, EPS[2]) * F.silu(h)
    return x + bit_linear(mixed, weights[3], norms[3], EPS[1], full)


def channel_reference(x, norm, weights, norms, full):
    y = rms_norm(x, norm, EPS[0])
    gate, up = bit_linear(y, weights[0], norms[0], EPS[1], full).chunk(2, -1)
    return x + bit_linear(F.silu(gate) * up, weights[1], norms[1], EPS[1], full)


def draw(*shape: int, mean: float = 0.0) -> Tensor:
    return (mean + 0.3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def compare(ours, theirs, inputs, grad) -> None:
    assert relative(ours, theirs) < 1e-13
    got = torch.autograd.grad((ours * grad).sum(), inputs)
    wanted = torch.autograd.grad((theirs * grad).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("size", [(2, 7, 12), (1, 1, 5)])
def test_mixer_has_the_gradients_of_autograd(size, bounded, keep, full):
    torch.manual_seed(0)
    d = size[-1]
    x, norm, gate = draw(*size), draw(d, mean=1), draw(d, mean=1)
    weights, norms = [draw(d, d) for _ in range(4)], [draw(d, mean=1) for _ in range(4)]
    bound = torch.rand(d, dtype=torch.float64).requires_grad_() if bounded else None
    slots = (new_slot(), new_slot())
    options = {"slots": slots, "keep": keep, "full_precision": full}
    ours = fused.mixer(x, norm, weights, norms, gate, bound, eps=EPS, **options)
    theirs = mixer_reference(x, norm, weights, norms, gate, bound, full)
    inputs = [x, norm, gate, *weights, *norms, *([bound] if bounded else [])]
    compare(ours, theirs, inputs, torch.randn_like(x))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("keep", [True, False])
def test_channel_has_the_gradients_of_autograd(keep, full):
    torch.manual_seed(0)
    x, norm = draw(2, 7, 12), draw(12, mean=1)
    weights, norms = (draw(38, 12), draw(12, 19)), (draw(12, mean=1), draw(19, mean=1))
    slots = (new_slot(), new_slot())
    options = {"slots": slots, "keep": keep, "full_precision": full}
    ours = fused.channel(x, norm, weights, norms, eps=EPS[:2], **options)
    theirs = channel_reference(x, norm, weights, norms, full)
    compare(ours, theirs, [x, norm, *weights, *norms], torch.randn_like(x))


@pytest.mark.parametrize("bounded", [True, False])
def test_gated_scan_has_the_gradients_of_its_states(bounded):
    torch.manual_seed(0)
    i, f = draw(2, 70, 5), draw(2, 70, 5)
    bound = torch.rand(5, dtype=torch.float64).requires_grad_() if bounded else None
    dh = torch.randn(2, 70, 5).double()
    forget = torch.sigmoid(f) if bound is None else bound + (1 - bound) * torch.sigmoid(f)
    h, _ = mlgru_recurrent(F.silu(i) * (1 - forget), forget)
    wanted = torch.autograd.grad((h * dh).sum(), [i, f, *([bound] if bounded else [])])
    with torch.no_grad():
        ours = naive.gated_scan(i, f, bound)
        assert relative(ours, h) < 1e-13
        di, df, dbound = naive.gated_scan_backward(i, f, bound, ours, dh)
    for a, b in zip((di, df, dbound), wanted, strict=False):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(("ternary", "full"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("z_share", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_linear_cross_entropy_has_the_gradients_of_autograd(ternary, full, z_share, chunk):
    torch.manual_seed(0)
    x, weight, norm = draw(2, 5, 8), draw(13, 8), draw(8, mean=1)
    targets = torch.randint(0, 13, (2, 5))
    targets[0, 1] = -100
    options = {"norm": norm, "slot": new_slot(), "full_precision": full} if ternary else {}
    loss, z = linear_cross_entropy(x, targets, weight, chunk=chunk, eps=EPS[1], **options)
    logits = bit_linear(x, weight, norm, EPS[1], full) if ternary else x @ weight.T
    expected = F.cross_entropy(logits.reshape(-1, 13), targets.reshape(-1))
    square = logits.logsumexp(-1)[targets != -100].square().mean()
    assert z.item() == pytest.approx(square.item(), rel=1e-12)
    inputs = [x, weight, *([norm] if ternary else [])]
    ours = loss + z_share * z if z_share else loss
    compare(ours, expected + z_share * square, inputs, torch.tensor(1.7).double())


def test_linear_cross_entropy_without_targets_or_gradients():
    x, weight = torch.randn(3, 8), torch.randn(13, 8)
    loss, z = linear_cross_entropy(x, torch.full((3,), -100), weight)
    assert loss == 0
    assert z == 0
    targets = torch.tensor([1, 2, 3])
    loss, _ = linear_cross_entropy(x, targets, weight, chunk=2)
    expected, _ = chunked_cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="does not fit"):
        linear_cross_entropy(x, targets[:2], weight)
    with pytest.raises(ValueError, match="below 0"):
        linear_cross_entropy(x, targets, weight, chunk=-1)


def test_operators_obey_torchs_rules():
    """Fake tensors, no aliases, autograd registration: what torch.compile relies on."""
    torch.manual_seed(0)
    d = 6
    x, vector = torch.randn(2, 3, d), torch.ones(d)
    square = [torch.randn(d, d) for _ in range(4)]
    arguments = (vector, *square, *[vector.clone() for _ in range(5)], torch.rand(d))
    tensors = [t.requires_grad_() for t in (x, *arguments)]
    rest = ([1e-6] * 3, [new_slot(), new_slot()], torch.float32, True, False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.nomatmul.mixer.default, (*tensors, *rest), test_utils=tests)
    small = [torch.randn(2, 3, d), vector, torch.randn(8, d), torch.randn(d, 4)]
    small = [t.detach().requires_grad_() for t in (*small, vector, torch.ones(4))]
    rest = ([1e-6] * 2, [new_slot(), new_slot()], torch.float32, False, True)
    torch.library.opcheck(torch.ops.nomatmul.channel.default, (*small, *rest), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
def test_a_product_of_floats_has_no_scales_and_keeps_the_residual_s_type(dtype, residual):
    """A residual stream wider than the operands is not rounded to them."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 5, 8).to(dtype), torch.randn(1, 3, 8).to(dtype)
    added = None if residual is None else (1 + torch.randn(5, 3) / 1000).to(residual)
    out = product(x, w, torch.ones(1, 5), torch.ones(1), residual or dtype, added)
    wanted = x[0].double() @ w[0].double().T
    if added is not None:
        wanted = wanted + added.double()
    assert (out.dtype, out.shape) == (residual or dtype, (1, 5, 3))
    digits = 2e-2 if torch.bfloat16 in (dtype, residual) else 1e-6
    torch.testing.assert_close(out[0].double(), wanted, rtol=digits, atol=digits)
    nothing = product(x * 0, w, torch.ones(1, 5), torch.ones(1), residual or dtype, added)
    assert torch.equal(nothing[0], torch.zeros(5, 3, dtype=dtype) if added is None else added)


def test_the_cache_tells_ternary_weights_from_those_that_are_not():
    weight, slot = torch.randn(3, 4), new_slot()
    with ternary_cache():
        t, _ = ternary_weights(slot, (weight,))
        plain, scale = ternary_weights(slot, (weight,), torch.float64)
        assert torch.equal(plain[0], weight.double())
        assert scale.tolist() == [1.0]
        assert ternary_weights(slot, (weight,), torch.float64)[0] is plain
        assert torch.equal(ternary_weights(slot, (weight,))[0], t)


def test_cache_keeps_until_cleared_or_changed():
    weight, slot = torch.randn(3, 4), new_slot()
    free, _ = ternary_weights(slot, (weight,))
    with ternary_cache() as cache:
        first, w_scale = ternary_weights(slot, (weight,))
        assert first is not free
        assert torch.equal(first, free)
        assert ternary_weights(slot, (weight,))[0] is first
        weight.mul_(2)
        changed, double = ternary_weights(slot, (weight,))
        assert changed is not first
        assert double == 2 * w_scale
        assert ternary_weights(slot, (weight.clone(),))[0] is not changed  # another tensor
        cache.clear()
        assert len(cache) == 0
        with ternary_cache() as inner:
            ternary_weights(slot, (weight,))
            assert (len(inner), len(cache)) == (1, 0)
    again, _ = ternary_weights(slot, (weight,))
    assert again is not ternary_weights(slot, (weight,))[0]


def test_a_kernel_that_fails_falls_back_once_with_its_reason(monkeypatch):
    monkeypatch.setattr(choose, "_fallback_reason", None)
    monkeypatch.setattr(choose, "triton_wanted", lambda kind: choose._fallback_reason is None)
    x = torch.randn(2, 4)
    arguments = (None, torch.ones(1, 4), 0.0, 1e-6, torch.int8)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch runs instead \(ModuleNotFoundError"):
        q, _ = choose.run("norm_quantize", "nomatmul.ops.no_such_module", steps, x, *arguments)
    assert torch.equal(q, steps.norm_quantize(x, *arguments)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose.run("norm_quantize", "nomatmul.ops.no_such_module", steps, x, *arguments)
    monkeypatch.setattr(choose, "_fallback_reason", None)
    monkeypatch.setenv("NOMATMUL_OPS", "triton")
    with pytest.raises(ModuleNotFoundError):
        choose.run("norm_quantize", "nomatmul.ops.no_such_module", steps, x, *arguments)
