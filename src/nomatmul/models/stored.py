"""Ternary weights as a published checkpoint stores them: values and scales, never quantised again.

A mean of |W| over ternary values is not the scale that they were stored with, so a model of
published ternary weights keeps both as they are and only computes. `to_latents` makes float
weights of them that training can move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import PLAIN, AnyLinear, BitLinear, RMSNorm, TernaryLinear, normed
from nomatmul.ops.bitlinear import Form, dequantize, latents, ternarize, ternary_linear


class TernaryEmbedding(nn.Embedding):
    """A table of ternary rows that training moves, one scale for `form.scale_group` elements.

    Holds latent float weights [rows, size]; ids [...] -> float [..., size].
    """

    def __init__(self, rows: int, size: int, form: Form) -> None:
        super().__init__(rows, size)
        self.form = form

    def forward(self, input: Tensor) -> Tensor:
        """input: ids [...] -> [..., size] in the weights' type; straight-through gradient."""
        rows = F.embedding(input, self.weight)
        flat = rows.detach().reshape(-1, self.embedding_dim)
        values = dequantize(*ternarize(flat, self.form)).reshape(rows.shape)
        return rows + (values.to(rows.dtype) - rows).detach()  # straight through


def embedding_of(part: parts.Embedding) -> nn.Embedding:
    """The table of this description, to train."""
    if part.kind == "ternary":
        return TernaryEmbedding(part.vocabulary, part.size, Form(scale_group=part.scale_group))
    return nn.Embedding(part.vocabulary, part.size)


class _Stored(nn.Module):
    """values int8 [rows, size] and scale float32, [blocks of rows] or [rows, groups]: buffers."""

    values: Tensor
    scale: Tensor

    def __init__(self, rows: int, size: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("values", torch.zeros(rows, size, dtype=torch.int8))
        scale = torch.zeros(form.scale_shape(rows, size), dtype=torch.float32)
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # a rounded scale is another model's
            self.scale = scale.to(self.scale.device)
        return self


class StoredLinear(_Stored):
    """A ternary linear of stored weights: computes what `TernaryLinear` does, does not train."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float | None = None, form: Form = PLAIN
    ) -> None:
        super().__init__(out_features, in_features, form)
        self.in_features, self.out_features = in_features, out_features
        self.norm = RMSNorm(in_features, eps) if eps is not None else None

    @classmethod
    def like(cls, layer: TernaryLinear) -> StoredLinear:
        """One of the same form and sizes, its values zero."""
        eps = layer.norm.eps if layer.norm is not None else None
        return cls(layer.in_features, layer.out_features, eps=eps, form=layer.form)

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """rms: accepted and ignored, so that all linears are called alike."""
        refuse_training(self)
        y, dtype = normed(x, self.norm)
        return ternary_linear(y, self.values, self.scale, form=self.form, dtype=dtype)

    def quantised(self) -> tuple[Tensor, Tensor]:
        """(values int8 [out, in], scale)."""
        return self.values, self.scale

    def trainable(self) -> TernaryLinear:
        """The layer that trains, its latent weights at these values."""
        sizes = self.in_features, self.out_features
        layer: TernaryLinear
        with torch.device("meta"):  # its own weights are not wanted
            if self.norm is not None and self.form == PLAIN:
                layer = BitLinear(*sizes, self.norm.eps)
            else:
                layer = TernaryLinear(*sizes, form=self.form)
        layer.norm = self.norm
        layer.weight = nn.Parameter(latents(self.values, self.scale))
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class StoredEmbedding(_Stored):
    """A table of stored ternary rows; ids [...] -> float32 [..., size]."""

    @property
    def num_embeddings(self) -> int:
        return len(self.values)

    def forward(self, input: Tensor) -> Tensor:
        """input: ids [...] -> float32 [..., size]. Raises ValueError in training mode."""
        refuse_training(self)
        rows = input.reshape(-1)
        values = dequantize(self.values[rows], self.scale[rows])
        return values.reshape(*input.shape, -1)

    def trainable(self) -> TernaryEmbedding:
        """The table that trains, its latent weights at these values."""
        with torch.device("meta"):
            table = TernaryEmbedding(self.num_embeddings, self.values.shape[1], self.form)
        table.weight = nn.Parameter(latents(self.values, self.scale))
        return table.train(self.training)


class StoredHead(nn.Module):
    """The head of a model whose stored ternary embedding is the head, too. It owns nothing."""

    def __init__(self, table: StoredEmbedding) -> None:
        super().__init__()
        self._table = (table,)  # a tuple: not a module of this one's own

    @property
    def form(self) -> Form:
        return self._table[0].form

    def forward(self, x: Tensor, rms: Tensor | None = None) -> Tensor:
        """x: [..., size] -> logits [..., rows]; rms: ignored. ValueError in training mode."""
        refuse_training(self)
        table = self._table[0]
        return ternary_linear(x, table.values, table.scale, form=table.form)


AnyHead = AnyLinear | StoredLinear | StoredHead


def refuse_training(layer: nn.Module) -> None:
    """Raises ValueError in training mode with gradients: nothing would learn."""
    if layer.training and torch.is_grad_enabled():
        raise ValueError(
            "this model holds ternary weights as they were published, which do not train: call"
            " to_latents() first, or eval() to compute with them"
        )


def store(model: nn.Module) -> None:
    """Put stored layers, still zero, in the place of all ternary linears and tables of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TernaryLinear):
                setattr(parent, name, StoredLinear.like(child))
            elif isinstance(child, TernaryEmbedding):
                table = StoredEmbedding(child.num_embeddings, child.embedding_dim, child.form)
                setattr(parent, name, table)


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model in which `store` has put stored layers, with this one's values.

    Of latent weights, quantised as training does it, scales rounded to float16, in which
    others keep them. Other tensors are those of `model` itself. A ternary embedding is not served.
    """
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, TernaryLinear):
            values, scale = layer.quantised()
            del state[f"{name}.weight"]
            state[f"{name}.values"] = values.to(torch.int8)
            state[f"{name}.scale"] = scale.half().float()
    return state


def unstore(model: nn.Module) -> None:
    """Put layers that train, of the same values, in the place of stored ones.

    Raises ValueError, with the model as it was, for scales that training cannot represent.
    """
    changed = [
        (parent, name, child.trainable())
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, StoredLinear | StoredEmbedding)
    ]
    for parent, name, layer in changed:
        setattr(parent, name, layer)
