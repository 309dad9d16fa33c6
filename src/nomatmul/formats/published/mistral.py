"""The published `mistral` family: Llama with sliding windows, which later models do not use."""

from __future__ import annotations

from nomatmul.formats.published.llama_like import Family

FAMILY = Family(
    "mistral",
    windows=True,
    default_window=4096,
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "num_key_value_heads": 8,
    },
)
