"""One configuration for each corner of the dials, small."""

from __future__ import annotations

from typing import Any

DIALS: dict[str, dict[str, Any]] = {
    "matmul-free": {},
    "transformer++": {
        "token_mixer": "attention",
        "linear": "dense",
        "num_heads": 4,
        "tie_embeddings": True,
    },
    "dense mlgru": {"linear": "dense", "channel_mixer": "ffn"},
    "ternary attention": {"token_mixer": "attention", "num_heads": 2, "channel_mixer": "ffn"},
    "union": {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2, "activation": "silu"},
    "trees with all there is": {
        "token_mixer": "attention",
        "linear": "dense",
        "num_heads": 2,
        "norm": "layer",
        "embedding_norm": True,
        "channel_mixer": "fff",
        "fff_trees": 2,
        "fff_depth": 3,
        "fff_bias": True,
        "fff_master_width": 8,
        "fff_layers": [1],
    },
    "no channel mixer": {"channel_mixer": "none", "use_lower_bound": False},
}
