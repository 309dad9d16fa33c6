"""The published `qwen3` family: Ternary-Bonsai, BitNet-embedding, and dense Qwen3."""

from __future__ import annotations

from nomatmul.formats.published.llama_like import Family

FAMILY = Family(
    "qwen3",
    qk_norm=True,
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "head_dim": 128,
        "num_key_value_heads": 32,
    },
    windows=True,
)
