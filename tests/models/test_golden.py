"""CausalLM against what the authors' kernels computed in float32."""

from __future__ import annotations

import pytest
import torch

from nomatmul.models import CausalLM
from nomatmul.models.causal_lm import cumulative_lower_bounds

BLOCK_LIMIT = 2e-3  # one int8 rounding may flip; float32 noise alone is 2e-7
WHOLE_LIMIT = 2e-2


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def trace(golden) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in golden.items()}


@pytest.fixture(scope="module")
def model(tiny) -> CausalLM:
    return CausalLM.from_pretrained(tiny)


@torch.no_grad()
def test_each_block(model, trace):
    bounds = cumulative_lower_bounds(model.lower_bounds)
    assert torch.equal(model.embedding(trace["input_ids"]), trace["hidden.0"])
    for number, block in enumerate(model.layers):
        bound = bounds[number] if number else None
        out = block(trace[f"hidden.{number}"], trace["attention_mask"], bound)
        assert relative(out, trace[f"hidden.{number + 1}"]) < BLOCK_LIMIT
    last = trace[f"hidden.{len(model.layers)}"]
    assert relative(model.head(model.final_norm(last)), trace["logits"]) < BLOCK_LIMIT


@torch.no_grad()
def test_the_whole(model, trace):
    logits = model(trace["input_ids"], attention_mask=trace["attention_mask"]).logits
    assert relative(logits, trace["logits"]) < WHOLE_LIMIT
    agreed = (logits.argmax(-1) == trace["logits"].argmax(-1)).float().mean()
    assert agreed >= 0.98
