"""Element-wise activations by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.formats.dials import ACTIVATIONS

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,  # of poolers only
}


def check_activation(name: str, legal: tuple[str, ...] = ACTIVATIONS) -> None:
    """Raise ValueError unless `name` is one of the legal activations."""
    if name not in legal:
        raise ValueError(f"activation {name!r} is not known: use one of {', '.join(legal)}")


def activate(logits: Tensor, activation: str) -> Tensor:
    """activation(logits), element by element; "gelu" is the exact form with the error function.

    Differentiable. Raises ValueError for an unknown activation.
    """
    if activation not in _FUNCTIONS:
        check_activation(activation)
    return _FUNCTIONS[activation](logits)
