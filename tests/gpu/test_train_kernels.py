"""Training kernels and fused models on a GPU, against float64 and the layer-by-layer path."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import FAMILIES, error, failures

from nomatmul.models import CausalLM, CausalLMConfig
from nomatmul.ops.bitlinear import ternary_cache

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    """A kernel that cannot run is an error here, not a fallback."""
    monkeypatch.setenv("NOMATMUL_OPS", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_equal_their_references(dtype, family):
    found, count = failures("cuda", dtype, family, large=dtype == torch.bfloat16)
    assert not found, "\n".join(found)
    assert count > 3


def _model(**values: object) -> CausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 96, "num_layers": 3, "intermediate_size": 200}
    model = CausalLM(CausalLMConfig(**{**sizes, **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.cuda().train()


def _gradients(model: CausalLM, ids: torch.Tensor, bf16: bool, z: float = 0.0) -> list:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss, square = model.loss(ids, ids.roll(-1, 1), chunk=50)
    (loss + z * square).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


_PLAIN = {"channel_mixer": "none", "use_lower_bound": False}


@pytest.mark.parametrize(
    ("values", "mode", "bf16", "z"),
    [
        ({}, "none", False, 0.0),
        ({}, "mlp", False, 0.1),
        ({}, "block", False, 0.0),
        (_PLAIN, "none", False, 0.0),
        ({}, "none", True, 0.0),
        ({}, "mlp", True, 0.1),
        ({}, "block", True, 0.0),
    ],
)
def test_fused_model_equals_the_layers(monkeypatch, values, mode, bf16, z):
    model = _model(**values)
    ids = torch.randint(0, 300, (3, 65), device="cuda")
    model.set_recompute(mode)
    fused = [g.clone() for g in _gradients(model, ids, bf16, z)]
    again = _gradients(model, ids, bf16, z)
    assert all(torch.equal(a, b) for a, b in zip(fused, again, strict=True)), "not deterministic"
    monkeypatch.setenv("NOMATMUL_OPS", "naive")
    plain = _gradients(model, ids, bf16, z)
    assert error(fused[0], plain[0]) < (2e-3 if bf16 else 1e-5)
    # An int8 value that flips between the two moves a token by 1e-3; bf16 rounds each layer.
    names = ["loss", *(name for name, _ in model.named_parameters())]
    far = [(n, error(a, b)) for n, a, b in zip(names, fused, plain, strict=True)]
    assert max(e for _, e in far) < (8e-2 if bf16 else 2e-3), [f for f in far if f[1] > 1e-3]


def test_compiled_equals_eager_and_the_cache_changes_nothing():
    model = _model()
    ids = torch.randint(0, 300, (2, 64), device="cuda")
    eager = [g.clone() for g in _gradients(model, ids, True)]
    with ternary_cache() as cache:
        first = [g.clone() for g in _gradients(model, ids, True)]
        assert len(cache) == 3 * 4 + 1
        second = _gradients(model, ids, True)
        for a, b, c in zip(eager, first, second, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)  # in place: the cache sees it
        changed = _gradients(model, ids, True)
        expected = _gradients(copy.deepcopy(model), ids, True)
        assert all(torch.equal(a, b) for a, b in zip(changed, expected, strict=True))


def test_torch_compile_takes_the_fused_model_whole():
    model = _model()
    ids = torch.randint(0, 300, (2, 64), device="cuda")
    eager = [g.clone() for g in _gradients(model, ids, True)]
    model.loss = torch.compile(model.loss, fullgraph=True)
    compiled = _gradients(model, ids, True)
    assert max(error(a, b) for a, b in zip(compiled, eager, strict=True)) < 2e-2
