"""Small models for the tests of the torch side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dials import DIALS

from nomatmul.models import CausalLM, CausalLMConfig, block, losses


@pytest.fixture
def build() -> Callable[..., CausalLM]:
    """build(name of DIALS or nothing, **config) -> a random model in eval mode."""

    def make(name: str = "matmul-free", **values: Any) -> CausalLM:
        torch.manual_seed(1)
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "intermediate_size": 48}
        model = CausalLM(CausalLMConfig(**{**sizes, **DIALS[name], **values}))
        with torch.no_grad():
            for parameter in model.parameters():  # away from the symmetric starting point
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 17]."""
    return torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on fused operations serve every device."""

    def switch() -> None:
        for module in (block, losses):
            monkeypatch.setattr(module, "fused_wanted", lambda x: x.dtype != torch.float64)

    return switch
