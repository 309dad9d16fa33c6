"""Structures that a wrapper can add to a model of the package.

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 4  # the last step and three before it


def add_short_convolutions(model: Any) -> None:
    """x += convolution(rms_norm(x)) before every block: one filter a channel, zero at first.

    Element-wise like MLGRU itself: no product of matrices, three rows of state a layer.
    """
    for layer in model.layers:
        taps = torch.zeros(KERNEL, layer.mixer_norm.weight.shape[0])
        layer.short = nn.Parameter(taps.to(layer.mixer_norm.weight.device))
        layer.register_forward_pre_hook(_convolve)


def _convolve(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x_BTD, *others = args
    y_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:]).to(x_BTD.dtype)  # autocast may have widened it
    y_BTD = F.pad(y_BTD, (0, 0, KERNEL - 1, 0))
    taps_KD, steps = layer.short.to(x_BTD.dtype), x_BTD.shape[1]
    for k in range(KERNEL):
        x_BTD = x_BTD + y_BTD[:, k : k + steps] * taps_KD[k]
    return (x_BTD, *others)


def hidden_matrices(model: Any) -> list[Tensor]:
    """The weights of the linear layers inside the blocks, without the head and the embedding."""
    return [
        module.weight
        for block in model.layers
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
