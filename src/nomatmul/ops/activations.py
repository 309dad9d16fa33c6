"""Element-wise activations by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "silu", "relu")


def check_activation(name: str) -> None:
    """Raise ValueError unless `name` is a known activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known: use one of {', '.join(ACTIVATIONS)}")


def activate(logits: Tensor, activation: str) -> Tensor:
    """activation(logits), element by element; "gelu" is the exact form with the error function.

    Differentiable. Raises ValueError for an unknown activation.
    """
    check_activation(activation)
    if activation == "gelu":
        return F.gelu(logits)
    return F.silu(logits) if activation == "silu" else F.relu(logits)
