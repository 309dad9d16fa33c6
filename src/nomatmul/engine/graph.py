"""A model described for the native core: the table of parts as plain values, and in which form
each weight is stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nomatmul.formats.architecture import FFF, Attention, Linear, Norm, Part, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import Forms
from nomatmul.formats.rotary import RopeScaling, frequencies


def describe(
    config: ModelConfig, forms: Forms, *, chunk: int = 256, kv: str = "f16"
) -> dict[str, Any]:
    """What `_native.Model` is made from; causal models have a head in the graph, encoders none."""
    model = architecture_of(config)
    words = _Words(config.causal, forms)
    embedding = {
        "kind": "embedding",
        "vocabulary": model.vocabulary,
        "hidden": model.size,
        "form": forms.embedding,
        "positions": config.max_position_embeddings if model.sinusoidal else 0,
    }
    if model.embedding_norm is not None:
        embedding["norm"] = words.of(model.embedding_norm)
    description = {
        "kind": "model",
        "causal": config.causal,
        "chunk": chunk,
        "positions": model.positions,
        "kv": kv,
        "embedding": embedding,
        "layers": [words.of(block) for block in model.blocks],
        "final_norm": words.of(model.final_norm),
    }
    if config.causal:
        description["head"] = words.of(model.head)
    return description


@dataclass(frozen=True)
class _Words:
    causal: bool
    forms: Forms

    def of(self, part: Part | Norm | Linear) -> dict[str, Any]:
        """A part's fields by name; those that are None are left out."""
        if isinstance(part, Linear):
            return self._linear(part)
        if isinstance(part, Norm):
            # a causal model promises the same bits on every instruction set (docs/numerics.md)
            return {"kind": part.kind, "size": part.size, "eps": part.eps, "exact": self.causal}
        fields: dict[str, Any] = {"kind": part.kind}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, (Part, Norm, Linear)):
                fields[field.name] = self.of(value)
            elif value is not None and not isinstance(value, RopeScaling):
                fields[field.name] = value
        if isinstance(part, Attention) and part.causal and part.theta is not None:
            inverse, factor = frequencies(part.head_size, part.theta, part.scaling)
            numbers = {str(pair): float(value) for pair, value in enumerate(inverse)}
            fields["rotary"] = {
                "kind": "rotary", "count": len(inverse), "factor": factor, **numbers
            }  # fmt: skip
        if isinstance(part, FFF):
            fields["form"] = "ternary" if part.linear == "ternary" else self.forms.rows
        return fields

    def _linear(self, linear: Linear) -> dict[str, Any]:
        fields: dict[str, Any] = {"outputs": linear.outputs, "inputs": linear.inputs}
        if linear.kind == "ternary":
            return {
                "kind": "ternary",
                "packing": self.forms.ternary,
                "norm_eps": linear.norm_eps,
                "rounding": "away",
                "scale_rows": 0,
                **fields,
            }
        if self.forms.dense == "int8":
            return {"kind": "int8", **fields}
        return {"kind": "float", "form": self.forms.dense, **fields}
