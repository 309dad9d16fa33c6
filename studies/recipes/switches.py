"""The fused operations with a part exchanged while a context is open.

`mixer`, `channel` and the head's loss take their weights by name, so these can be others without a
flag in the package. A CUDA graph keeps what was in place when it was recorded.

Shape suffix: K inputs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.models import block, losses
from nomatmul.ops.loss import linear

# by name: functions of the same names hide these modules in their package
mixer = importlib.import_module("nomatmul.ops.fused.mixer")
channel = importlib.import_module("nomatmul.ops.fused.channel")


@contextlib.contextmanager
def fused_everywhere() -> Iterator[None]:
    """The fused operations on a CPU, too, where their steps are plain PyTorch."""
    with (
        patch.object(block, "fused_wanted", lambda x: x.dtype != torch.float64),
        patch.object(losses, "fused_wanted", lambda x: x.dtype != torch.float64),
    ):
        yield


@contextlib.contextmanager
def group_scales(group: int) -> Iterator[None]:
    """Ternary weights whose rows have a scale for each `group` inputs, the mean of their sizes.

    A row whose length `group` does not divide has a shorter last group. Inputs stay int8 a token.
    Products are of floats, as those of layers in full precision.
    """

    def weights_for(
        slot: int, weights: Sequence[Tensor], dtype: torch.dtype, full_precision: bool
    ) -> tuple[Tensor, Tensor]:
        values = ternary_groups(torch.stack(list(weights)), group).to(dtype)
        return values, torch.ones(len(weights), device=values.device)

    with contextlib.ExitStack() as stack:
        for module in (mixer, channel, linear):
            stack.enter_context(patch.object(module, "weights_for", weights_for))
        yield


def ternary_groups(weight: Tensor, group: int) -> Tensor:
    """Values [..., K] times the scale of their group."""
    padded = F.pad(weight.float(), (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))
    real = F.pad(torch.ones_like(weight[..., :1, :]), (0, -weight.shape[-1] % group))
    count = real.unflatten(-1, (-1, group)).sum(-1, keepdim=True)
    scale = (padded.abs().sum(-1, keepdim=True) / count).clamp(min=1e-5)
    values = ((padded / scale).round().clamp(-1, 1) * scale).flatten(-2)
    return values[..., : weight.shape[-1]]
