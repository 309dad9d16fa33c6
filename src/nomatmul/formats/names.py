"""Names and shapes of a training checkpoint's tensors, for code that has a config at hand."""

from __future__ import annotations

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of the torch state dict; a tied head has no weight of its own."""
    return architecture_of(config).tensors()
