"""How the weights of a published decoder are ternary, if they are: said by its config, or found.

Weights that carry int8 activations (BitNet, Falcon, BitNet-embedding) are told by their config or
by the norm inside each linear. Others are ternary by their values alone: every element of every
linear is compared, and a model of which one matrix is not ternary is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.files.quantised import GROUPS
from nomatmul.formats.files.source import TensorSource
from nomatmul.formats.files.wrappers import missing_tensor
from nomatmul.formats.published.bit_linear import BitLinears, bit_linears, first_bit_linears
from nomatmul.formats.published.llama_like import Family
from nomatmul.formats.published.llama_names import HEAD, Names
from nomatmul.formats.published.ternary_values import TernaryValues, scan, stray_share
from nomatmul.formats.quantise import fits_float16

_SCALE = ".weight_scale"
# Magnitudes of a group that differ by so little were meant to be one; so few others are damage. Of
# random values 2 % are so near to their group's median.
_NEARLY_EQUAL, _FEW = 0.01, 0.01
_LOST_KEY = (
    "is a BitNet model, but its config.json has no quantization_config, which says how its weights"
    " are meant"
)


@dataclass(frozen=True)
class Form:
    """Whether and how weights are ternary.

    words: for people. bits: BitLinears with int8 activations a token. group: inputs that share a
    scale of weights-only models. head, embedding: the kinds of these, "ternary" or "dense". norms:
    "all", "sub" or "none" of the linears have a norm inside. scales: {what has one scale: number of
    matrices} as found; half: float16 holds those of groups exactly.
    """

    words: str = "floats"
    bits: BitLinears | None = None
    group: int = 0
    head: str = "dense"
    embedding: str = "dense"
    norms: str = "none"
    scales: dict[str, int] = field(default_factory=dict)
    half: bool = False

    @property
    def apart(self) -> bool:
        """Whether gate and up are linears of their own, because each has a norm inside."""
        return self.bits is not None and self.norms == "all"

    def dials(self, norm_eps: float) -> dict[str, Any]:
        """The fields of ModelConfig that speak of linears."""
        if self.bits is None and not self.group:
            return {"linear": "dense"}
        eps = norm_eps if self.bits is None else self.bits.norm_eps
        return {
            "linear": "ternary",
            "linear_norm": self.norms,
            "linear_norm_eps": norm_eps if eps is None else eps,
            "rounding": "even" if self.bits is None else self.bits.rounding,
            "split_gate": self.bits is not None,
            "scale_group": self.group,
            "head_linear": self.head,
            "embedding_linear": self.embedding,
        }


def find_form(family: Family, values: JsonObject, source: TensorSource, names: Names) -> Form:
    """Raises FormatError for a config that does not say how its packed weights are meant, and for
    weights of which some are ternary and some are not."""
    linears = names.linears(values["num_hidden_layers"])
    shapes = source.shapes()
    sub_norms = family.sub_norms or names.has_sub_norms(shapes)
    bits = bit_linears(values, linears)
    if bits is None:
        bits = _without_key(family, values, source, linears, sub_norms=sub_norms)
    if bits is None:
        found = _found(values, source, names, linears)
        if not found.group and values.get("is_bitnet_config"):
            raise FormatError(_LOST_KEY)
        return found
    if bits.norm_eps is not None and sub_norms:
        raise FormatError(
            f"use_rms_norm does not go with model_type {family.model_type!r}, which has sub-norms"
        )
    norms = "sub" if sub_norms else "none" if bits.norm_eps is None else "all"
    held = [source.quantised(f"{n}.weight") for n in linears if f"{n}.weight" in shapes]
    words = "ternary with one scale a tensor" if any(held) else bits.words
    return Form(words, bits, norms=norms, scales={"a tensor": len(linears)})


def _without_key(
    family: Family, values: JsonObject, source: TensorSource, linears: list[str], *, sub_norms: bool
) -> BitLinears | None:
    """BitLinears that no quantization_config speaks of; None for floats.

    The norm inside each linear says that the model is one of BitNet-embedding's form: masters,
    ternarised and fed with int8 as in the other families; `weight_bits` beside sub-norms, that it
    is one of the first BitNet b1.58. Everything else that looks like BitLinears is refused, because
    as floats it would run and answer nonsense.
    """
    shapes, packed = source.shapes(), source.byte_shapes()
    odd = [n for n in linears if f"{n}.weight" in packed or n + _SCALE in shapes]
    if odd:
        what = f"{odd[0]}.weight" if f"{odd[0]}.weight" in packed else odd[0] + _SCALE
        raise FormatError(
            f"holds {what!r}, but its config.json has no quantization_config, which says how such"
            " weights are meant"
        )
    first = first_bit_linears(values)
    if first is not None and not sub_norms:
        raise FormatError("weight_bits is 1, but the blocks have no norms before o_proj, down_proj")
    if first is not None:
        return first
    if all(f"{name}.norm.weight" in shapes for name in linears):
        return BitLinears(
            False, online=True, norm_eps=values.get("rms_norm_eps", 1e-6), rounding="even"
        )
    if family.sub_norms:
        raise FormatError(_LOST_KEY)
    return None


def _found(values: JsonObject, source: TensorSource, names: Names, linears: list[str]) -> Form:
    """Weights-only models: ternary if every linear of every block is."""
    found = {name: _scan(source, f"{name}.weight") for name in linears}
    ternary = [name for name, values in found.items() if values is not None and not values.empty]
    strays = [name for name, values in found.items() if values is None]
    if strays and 2 * len(ternary) > len(linears):
        words = "is not ternary, as most linears of this model are"
        raise FormatError(_stray_words(source, f"{strays[0]}.weight", words))
    if strays and _nearly_ternary(source, f"{strays[0]}.weight"):
        raise FormatError(_stray_words(source, f"{strays[0]}.weight", "is nearly ternary"))
    if strays or not ternary:
        return Form()
    tied = bool(values.get("tie_word_embeddings", False))
    embedding = _scan(source, names.embedding())
    head = None if tied else _scan(source, f"{HEAD}.weight")
    matrices = {**found, "embedding": embedding, HEAD: head}
    kept = {n: v for n, v in matrices.items() if v is not None and (v.group or n in found)}
    kind = functools.partial(_kind, kept)
    return Form(
        "ternary values",
        group=_group(source, kept),
        embedding=kind("embedding"),
        head=kind("embedding" if tied else HEAD),
        scales=_counted(kept),
        half=all(values.half for values in kept.values()),
    )


def _kind(kept: dict[str, TernaryValues], name: str) -> str:
    return "ternary" if name in kept and not kept[name].empty else "dense"


def _scan(source: TensorSource, name: str) -> TernaryValues | None:
    """What is ternary in a tensor; None for floats, and for what is no matrix or absent."""
    shape = source.shapes().get(name, ())
    if len(shape) != 2 or not all(shape):
        return None
    held = source.quantised(name)
    if held is not None and held.kind == "ternary":
        held.checked(name)
        if held.group:
            words = f"{held.group} inputs of a row"
            return TernaryValues(held.group, words, empty=False, half=fits_float16(held.scale))
    return scan(lambda rows: source.read(name, rows), (shape[0], shape[1]))


def _group(source: TensorSource, kept: dict[str, TernaryValues]) -> int:
    """The largest group that divides all of the model's own."""
    for name, values in kept.items():
        if not values.group:
            width = source.shapes()[f"{name}.weight"][1]
            raise FormatError(
                f"{name + '.weight'!r} is ternary with rows of {width} inputs, which no group of"
                f" {', '.join(map(str, reversed(GROUPS)))} divides"
            )
    return next(g for g in GROUPS if all(v.group % g == 0 for v in kept.values()))


def _counted(kept: dict[str, TernaryValues]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for values in kept.values():
        counts[values.scales] = counts.get(values.scales, 0) + 1
    return counts


def _nearly_ternary(source: TensorSource, name: str) -> bool:
    """Whether a matrix is ternary but for rounding and few values: then the model was meant to be,
    and as one of floats it would be as large and slow as none that was."""
    shape = source.shapes().get(name, ())
    if len(shape) != 2:
        return False
    read = functools.partial(source.read, name)
    return stray_share(read, (shape[0], shape[1]), _NEARLY_EQUAL) < _FEW


def _stray_words(source: TensorSource, name: str, words: str) -> str:
    shape = source.shapes().get(name)
    if shape is None:
        return missing_tensor(source, name)
    if len(shape) != 2 or not all(shape):
        return f"{name!r} has shape {list(shape)}, which is no matrix"
    share = stray_share(lambda rows: source.read(name, rows), (shape[0], shape[1]))
    return (
        f"{name!r} {words}: {100 * share:.3g} % of its values are neither 0 nor its group's"
        " magnitude"
    )
