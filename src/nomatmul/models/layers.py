"""Norms and linear layers.

Each layer can be used alone; none of them knows of a configuration object.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.ops.bitlinear import bit_linear, new_slot, root_mean_square

XAVIER_GAIN = 2**-2.5
"""Of a layer's first weights where no model says otherwise (the authors' choice for MLGRU)."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    The result has x's dtype (autocast does not lower it).
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() / root_mean_square(x, self.eps) * self.weight.float()
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32.

    float64 stays float64; the result has x's dtype (autocast does not lower it).
    """

    def __init__(self, size: int, eps: float = 1e-12) -> None:
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        return F.layer_norm(x.to(kind), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def norm_of(part: parts.Norm) -> RMSNorm | LayerNorm:
    """The norm of this description."""
    return make_norm(part.size, part.kind, part.eps)


def make_norm(size: int, kind: str = "rms", eps: float = 1e-6) -> RMSNorm | LayerNorm:
    """The norm that the dial `norm` names: "rms" or "layer". Raises ValueError for another."""
    if kind == "rms":
        return RMSNorm(size, eps)
    if kind == "layer":
        return LayerNorm(size, eps)
    raise ValueError(f"norm {kind!r} is not known: use 'rms' or 'layer'")


class BitLinear(nn.Linear):
    """Linear layer of ternary weights and int8 activations with its own RMSNorm in front.

    Holds latent float weights [out, in] that training moves; every forward pass uses
    mean|W| * clip(round(W / mean|W|), -1, 1). No bias. x: [..., in] -> [..., out].
    An nn.Linear to those who look for linear layers (adapters attach to it), not in what it
    computes. Source: arXiv 2406.02528, section 3.2.
    """

    initial_std: float | None = None  # set by CausalLM: normal weights instead of Xavier-uniform

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-6) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.norm = RMSNorm(in_features, eps)
        self.slot = new_slot()  # where `ternary_cache` keeps this layer's ternary weights

    def reset_parameters(self) -> None:
        """Xavier-uniform weights with gain 2^-2.5, norm at one; `CausalLM` has its own plan."""
        nn.init.xavier_uniform_(self.weight, gain=XAVIER_GAIN)
        if "norm" in self._modules:  # nn.Linear's constructor comes here before there is one
            nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """rms: `root_mean_square(x, eps)` where several layers read the same x."""
        return bit_linear(x, self.weight, self.norm.weight, self.norm.eps, rms=rms)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class DenseLinear(nn.Linear):
    """nn.Linear without bias; accepts and ignores `rms` so that both kinds are called alike."""

    initial_std: float | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight)


def shared_rms(x: Tensor, layer: nn.Module) -> Tensor | None:
    """`root_mean_square` of x for all layers that read it, `layer` being one; None if dense.

    An adapter's wrapper counts as the layer that it wraps.
    """
    layer = getattr(layer, "base_layer", layer)
    return root_mean_square(x.detach(), layer.norm.eps) if isinstance(layer, BitLinear) else None


def is_ternary(layer: nn.Module) -> bool:
    """Is it a BitLinear, or an adapter's wrapper around one?"""
    return isinstance(getattr(layer, "base_layer", layer), BitLinear)


def make_linear(
    in_features: int, out_features: int, kind: str = "ternary", eps: float = 1e-6
) -> BitLinear | DenseLinear:
    """The linear layer that the dial `linear` names: "ternary" or "dense".

    Raises ValueError for any other name.
    """
    if kind == "ternary":
        return BitLinear(in_features, out_features, eps)
    if kind == "dense":
        return DenseLinear(in_features, out_features)
    raise ValueError(f"linear {kind!r} is not known: use 'ternary' or 'dense'")


def linear_of(part: parts.Linear) -> BitLinear | DenseLinear:
    """The linear layer of this description."""
    return make_linear(part.inputs, part.outputs, part.kind, part.norm_eps or 1e-6)
