"""Train a MatMul-free language model (or its Transformer++ twin) on your own text."""

from __future__ import annotations

EXAMPLES = ""
