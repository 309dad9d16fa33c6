"""The fused operations with a part exchanged while a context is open.

`mixer`, `channel` and the head's loss call their steps by name (`ops.fused.parts.step`), so one
step can be another one without a flag in the package. A CUDA graph keeps what was in place when it
was recorded.

Shape suffixes: N tokens, M intermediate, K inputs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.models import base, block
from nomatmul.ops.bitlinear import absmax_quantize, root_mean_square
from nomatmul.ops.fused.parts import step
from nomatmul.ops.loss import linear

# by name: functions of the same names hide these modules in their package
mixer = importlib.import_module("nomatmul.ops.fused.mixer")
channel = importlib.import_module("nomatmul.ops.fused.channel")


@contextlib.contextmanager
def fused_everywhere() -> Iterator[None]:
    """The fused operations on a CPU, too, where their steps are plain PyTorch."""
    with (
        patch.object(block, "fused_wanted", lambda x: x.dtype != torch.float64),
        patch.object(base, "fused_wanted", lambda x: x.dtype != torch.float64),
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


@contextlib.contextmanager
def squared_relu() -> Iterator[None]:
    """relu(gate)^2 * up in place of silu(gate) * up in every GLU."""
    own = {"glu_quantize": glu_quantize, "glu_backward": glu_backward}

    def run(name: str, x: Tensor, *args: Any, **options: Any) -> Any:
        return own[name](x, *args, **options) if name in own else step(name, x, *args, **options)

    with patch.object(channel, "step", run):
        yield


def glu_quantize(
    gu_N2M: Tensor, norm_M: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `ops.bitlinear.steps.glu_quantize`."""
    gate, up = gu_N2M.float().chunk(2, -1)
    y_NM = gate.relu().square() * up
    q, unit = absmax_quantize(y_NM / root_mean_square(y_NM, eps) * norm_M)
    q = q if dtype == torch.int8 else q * unit
    return q.to(dtype).unsqueeze(0), unit.squeeze(-1).unsqueeze(0)


def glu_backward(
    gu_N2M: Tensor, norm_M: Tensor, d_NM: Tensor, w_scale_G: Tensor, eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `ops.bitlinear.steps.glu_backward`; nothing is written over."""
    gate, up = gu_N2M.float().chunk(2, -1)
    positive = gate.relu()
    y_NM = positive.square() * up
    root_N1 = root_mean_square(y_NM, eps)
    hat_NM = y_NM / root_N1
    q, unit = absmax_quantize(hat_NM * norm_M)
    dy_NM = d_NM.float() * w_scale_G
    dnorm_M = (dy_NM * hat_NM).sum(0)
    dy_NM = dy_NM * norm_M
    dy_NM = (dy_NM - hat_NM * (dy_NM * hat_NM).mean(-1, keepdim=True)) / root_N1
    dgu = torch.cat([dy_NM * up * 2 * positive, dy_NM * positive.square()], -1)
    return dgu.to(gu_N2M.dtype), (q * unit).to(d_NM.dtype), dnorm_M
