"""The published `bitnet` family (BitNet b1.58-2B-4T): Llama with squared relu and sub-norms."""

from __future__ import annotations

from nomatmul.formats.published.llama_like import Family

FAMILY = Family(
    "bitnet",
    activation="relu2",
    sub_norms=True,
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "num_key_value_heads": 5,
    },
)
