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
    "norms in front of outputs": {
        "token_mixer": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "linear_norm": "sub",
        "rounding": "even",
        "split_gate": True,
        "glu_activation": "relu2",
        "head_linear": "dense",
        "tie_embeddings": True,
    },
    "no norms inside": {
        "token_mixer": "attention",
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 24,
        "linear_norm": "none",
        "rounding": "up",
        "split_gate": True,
        "head_linear": "dense",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "norms inside gate and up": {
        "token_mixer": "attention",
        "num_heads": 2,
        "qk_norm": True,
        "rounding": "even",
        "split_gate": True,
        "head_linear": "dense",
    },
    "scales of groups": {
        "token_mixer": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "qk_norm": True,
        "linear_norm": "none",
        "scale_group": 32,
        "embedding_linear": "ternary",
        "tie_embeddings": True,
    },
    "no channel mixer": {"channel_mixer": "none", "use_lower_bound": False},
}
