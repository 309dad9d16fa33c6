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
    "no channel mixer": {"channel_mixer": "none", "use_lower_bound": False},
}
