"""What the layers that were tried in place of `nomatmul.models.FFF` share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nomatmul.models import FFF
from nomatmul.ops.bitlinear.steps import int8
from nomatmul.ops.fff.ternary import Straight


def replace_trees(model: nn.Module, make: Callable[[FFF], nn.Module]) -> int:
    """Put make(layer) in the place of every FFF layer of a model's blocks; returns how many.

    The new layers' weights are drawn as the model draws its own.
    """
    count = 0
    for block in model.layers if isinstance(model.layers, nn.ModuleList) else ():
        if type(block.channel) is FFF:
            layer = make(block.channel)
            layer.initial_std = block.channel.initial_std
            layer.reset_parameters()
            block.channel, count = layer, count + 1
    return count


def straight_int8(y: Tensor) -> tuple[Tensor, Tensor]:
    """(q, step): int8 values in y's type and the value of one unit [..., 1], a scale a row.

    y: float32 or float64. The gradient of y is that of y / step.
    """
    with torch.no_grad():
        q, step = int8(y)
    return Straight.apply(y, q, step, y.dtype), step
