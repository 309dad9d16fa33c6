"""Small encoders for the tests: one for each corner of the dials."""

from __future__ import annotations

from typing import Any

import torch

from nomatmul.models import EncoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pooler_size": 20,
}

TREES: dict[str, Any] = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2}

DIALS: dict[str, dict[str, Any]] = {
    "bert": {},
    "ultrafastbert": {**TREES, "fff_bias": True},
    "ternary trees": {**TREES, "linear": "ternary", "norm": "rms", "activation": "silu"},
    "trees in one layer": {**TREES, "fff_layers": [1], "fff_master_width": 8},
    "glu, rotary": {"channel_mixer": "glu", "positions": "rotary", "embedding_norm": False},
    "no channel mixer": {"channel_mixer": "none", "positions": "none", "tie_embeddings": False},
    "ternary": {"linear": "ternary", "norm_eps": 1e-6},
}


def build(kind: Any, name: str = "bert", **values: Any) -> Any:
    """A random encoder of class `kind` in eval mode, moved away from its symmetric start."""
    torch.manual_seed(1)
    model = kind(EncoderConfig(**{**SIZES, **DIALS[name], **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def some_ids(batch: int = 2, steps: int = 17) -> torch.Tensor:
    """Token ids [batch, steps]."""
    return torch.randint(3, 64, (batch, steps), generator=torch.Generator().manual_seed(0))


def some_labels(ids: torch.Tensor, count: int = 4) -> torch.Tensor:
    """The ids of `count` random places a row, elsewhere -100."""
    places = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :count]
    labels = torch.full_like(ids, -100)
    return labels.scatter(1, places, ids.gather(1, places))
