"""The published `llama` family: Falcon3-1.58bit, Falcon-E, TriLM, and dense Llamas."""

from __future__ import annotations

from nomatmul.formats.published.llama_like import Family

FAMILY = Family(
    "llama",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)
