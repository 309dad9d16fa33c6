"""A model described for the native core: the table of parts as plain values, and in which form
each weight is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nomatmul.formats.architecture import (
    FFF,
    Architecture,
    Attention,
    Linear,
    Norm,
    Part,
    architecture_of,
)
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.forms import INT8_GROUP, Forms, is_table
from nomatmul.formats.packing import PACKINGS
from nomatmul.formats.rotary import RopeScaling, frequencies

MOST_POSITIONS = 2**31 - 1  # the core counts them in 32 bits


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
        **words.scales(forms.embedding, model.embedding.scale_group),
    }
    if model.embedding_norm is not None:
        embedding["norm"] = words.of(model.embedding_norm)
    description = {
        "kind": "model",
        "causal": config.causal,
        "chunk": chunk,
        "positions": min(model.positions, MOST_POSITIONS),
        "kv": kv,
        "embedding": embedding,
        "layers": [words.of(block) for block in model.blocks],
        "final_norm": words.of(model.final_norm),
    }
    if config.causal:
        head = words.head(model)
        description["head"] = head
        embedding["tied"] = "tied" in head
    return description


def rearranged(description: dict[str, Any], at: str = "") -> Iterator[str]:
    """Names of the tensors that the core copies into an order of its own: those of linears whose
    scales belong to groups or, int8 in a causal model, to rows."""
    for key, value in description.items():
        parts = {f"{key}.{index}": part for index, part in enumerate(value)} if (
            isinstance(value, list)
        ) else {key: value}  # fmt: skip
        for name, part in parts.items():
            if not isinstance(part, dict):
                continue
            yield from rearranged(part, f"{at}{name}.")
            owner = "embedding" if part.get("tied") else f"{at}{name}"
            if part["kind"] == "ternary" and "scale_group" in part:
                yield from (f"{owner}.packed", f"{owner}.scale")
            elif part["kind"] == "int8" and "exact" in part:
                yield from (f"{owner}.weight", f"{owner}.scale")


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

    def head(self, model: Architecture) -> dict[str, Any]:
        """The head of a causal model; one that is the embedding's matrix owns its tensors."""
        head, tied = model.head, is_table(model, self.forms)
        form = self.forms.embedding if tied else self.forms.head
        fields = self._linear(head, form if head.kind == "dense" and form != "none" else None)
        return {**fields, "tied": True} if tied else fields

    def scales(self, form: str, group: int) -> dict[str, Any]:
        """How the scales of a matrix lie that has some; group: of a ternary one."""
        if form not in (*PACKINGS, "int8", "int8-32"):
            return {}
        size = {"int8": 0, "int8-32": INT8_GROUP}.get(form, group)
        return {"scale_group": size, "scale": self.forms.scale} if size else {"scale_group": 0}

    def _linear(self, linear: Linear, form: str | None = None) -> dict[str, Any]:
        """form: of a dense one, if not that of the blocks."""
        fields: dict[str, Any] = {"outputs": linear.outputs, "inputs": linear.inputs}
        if linear.kind == "ternary":
            fields |= {"kind": "ternary", "packing": self.forms.ternary}
            if linear.norm_eps is not None:
                fields["norm_eps"] = linear.norm_eps
            if linear.scale_group:
                return {**fields, **self.scales(self.forms.ternary, linear.scale_group)}
            return {**fields, "rounding": linear.rounding, "scale_rows": linear.scale_rows}
        form = form or self.forms.dense
        if self.causal:
            fields["exact"] = True
        if form not in ("int8", "int8-32"):
            return {"kind": "float", "form": form, **fields}
        return {"kind": "int8", **fields, **(self.scales(form, 0) if self.causal else {})}
