"""Norms and linear layers.

Each layer can be used alone; none of them knows of a configuration object.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.ops.bitlinear import (
    Form,
    bit_linear,
    new_slot,
    product_dtype,
    root_mean_square,
    ternarize,
    ternary_linear,
)

PLAIN = Form()
"""The form of MatMul-free LM: one scale a matrix, int8 activations, ties away from zero."""
XAVIER_GAIN = 2**-2.5
"""Of a layer's first weights where no model says otherwise (the authors' choice for MLGRU)."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    The result has x's dtype (autocast does not lower it). Source: arXiv 1910.07467, eq. 4.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] of any float type."""
        y = x.float() / root_mean_square(x, self.eps) * self.weight.float()
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32.

    float64 stays float64; the result has x's dtype (autocast does not lower it). Source: arXiv
    1607.06450.
    """

    def __init__(self, size: int, eps: float = 1e-12) -> None:
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] of any float type."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        return F.layer_norm(x.to(kind), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def norm_of(part: parts.Norm) -> RMSNorm | LayerNorm:
    """The norm of this description."""
    return make_norm(part.size, part.kind, part.eps)


def normed(x: Tensor, norm: RMSNorm | None) -> tuple[Tensor, torch.dtype]:
    """What a ternary linear quantises, in float32 behind its norm, and the type that it gives."""
    return x if norm is None else norm(x.float()), product_dtype(x)


def make_norm(size: int, kind: str = "rms", eps: float = 1e-6) -> RMSNorm | LayerNorm:
    """The norm that the dial `norm` names: "rms" or "layer". Raises ValueError for another."""
    if kind == "rms":
        return RMSNorm(size, eps)
    if kind == "layer":
        return LayerNorm(size, eps)
    raise ValueError(f"norm {kind!r} is not known: use 'rms' or 'layer'")


class TernaryLinear(nn.Linear):
    """Linear layer of ternary weights that training moves; no bias. x: [..., in] -> [..., out].

    Holds latent float weights [out, in]; every forward pass uses mean|W| * clip(round(W / mean|W|),
    -1, 1), the mean over what shares a scale. `form` says what that is and how activations are
    rounded; eps: of the RMSNorm in front of the quantiser, None for none.
    full_precision: weights are multiplied as they are, activations rounded as ever
    (`TextModel.set_full_precision`).
    An nn.Linear to those who look for linear layers (adapters attach to it), not in what it
    computes. Plain PyTorch serves every form; `BitLinear` is the one with fused operations.
    """

    initial_std: float | None = None  # set by CausalLM: normal weights instead of Xavier-uniform
    norm: RMSNorm | None
    full_precision: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float | None = None,
        form: Form = PLAIN,
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.form = form
        self.norm = RMSNorm(in_features, eps) if eps is not None else None

    def reset_parameters(self) -> None:
        """Xavier-uniform weights with gain 2^-2.5, norm at one; `CausalLM` has its own plan."""
        nn.init.xavier_uniform_(self.weight, gain=XAVIER_GAIN)
        norm = self._modules.get("norm")  # nn.Linear's constructor comes here before there is one
        if isinstance(norm, RMSNorm):
            nn.init.ones_(norm.weight)

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """rms: accepted and ignored, so that all linears are called alike."""
        y, dtype = normed(x, self.norm)
        scale = None
        if self.full_precision:  # the values of a product whose scales are one
            scale = self.weight.new_ones(self.form.scale_shape(*self.weight.shape)).float()
        return ternary_linear(y, self.weight, scale, form=self.form, dtype=dtype)

    def quantised(self) -> tuple[Tensor, Tensor]:
        """(values -1, 0, +1 float32 [out, in], scale float32 as of `Form.scale_shape`)."""
        return ternarize(self.weight.detach(), self.form)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class BitLinear(TernaryLinear):
    """The ternary layer of MatMul-free LM: int8 activations with its own RMSNorm in front.

    One scale a matrix, ties of activations away from zero. Source: arXiv 2406.02528, section 3.2.
    """

    norm: RMSNorm

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-6) -> None:
        super().__init__(in_features, out_features, eps=eps)
        self.slot = new_slot()  # where `ternary_cache` keeps this layer's ternary weights

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """rms: `root_mean_square(x, eps)` where several layers read the same x."""
        return bit_linear(
            x, self.weight, self.norm.weight, self.norm.eps, rms=rms,
            full_precision=self.full_precision,
        )  # fmt: skip


class DenseLinear(nn.Linear):
    """nn.Linear without bias; accepts and ignores `rms` so that both kinds are called alike."""

    initial_std: float | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out]; rms: ignored."""
        return F.linear(x, self.weight)


AnyLinear = TernaryLinear | DenseLinear


def shared_rms(x: Tensor, layer: nn.Module) -> Tensor | None:
    """`root_mean_square` of x for all layers that read it, `layer` being one; None unless those
    are BitLinears.

    An adapter's wrapper counts as the layer that it wraps.
    """
    layer = getattr(layer, "base_layer", layer)
    return root_mean_square(x.detach(), layer.norm.eps) if isinstance(layer, BitLinear) else None


def rounds_itself(layer: nn.Module) -> bool:
    """Does it quantise its input, in float32 whatever its type? An adapter's wrapper counts as the
    layer that it wraps."""
    form = getattr(getattr(layer, "base_layer", layer), "form", None)
    return isinstance(form, Form) and not form.scale_group


def is_plain(part: parts.Linear) -> bool:
    """Is it a BitLinear? Fused operations serve no other form of ternary layer."""
    return part.kind == "ternary" and part.norm_eps is not None and form_of(part) == PLAIN


def form_of(part: parts.Linear) -> Form:
    """The form of a ternary linear of this description."""
    return Form(part.rounding, part.scale_rows, part.scale_group)


def make_linear(
    in_features: int, out_features: int, kind: str = "ternary", eps: float = 1e-6
) -> AnyLinear:
    """The linear layer that the dial `linear` names: "ternary" (a BitLinear) or "dense".

    Raises ValueError for any other name.
    """
    return linear_of(parts.Linear(kind, out_features, in_features, eps))


def linear_of(part: parts.Linear) -> AnyLinear:
    """The linear layer of this description. Raises ValueError for a kind that is not known."""
    if part.kind == "dense":
        return DenseLinear(part.inputs, part.outputs)
    if part.kind != "ternary":
        raise ValueError(f"linear {part.kind!r} is not known: use 'ternary' or 'dense'")
    if is_plain(part) and part.norm_eps is not None:
        return BitLinear(part.inputs, part.outputs, part.norm_eps)
    return TernaryLinear(part.inputs, part.outputs, eps=part.norm_eps, form=form_of(part))
