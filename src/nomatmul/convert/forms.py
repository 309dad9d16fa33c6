"""Which form each kind of matrix of a packed model gets, asked for or chosen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np

from nomatmul.convert.matrices import Floats, blocks
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.packed import Forms
from nomatmul.formats.packed.layout import DENSE_FORMS, FLOAT_FORMS, layout_of, legal_forms
from nomatmul.formats.packing import PACKINGS
from nomatmul.formats.quantise import fits_float16, to_float16

# Names of float types that people write instead.
ALIASES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
KINDS = ("embedding", "head", "rows", "dense")

FLOATS = ("f32", "bf16", "f16")
_INT8 = "int8-32"
_EXACT = "exact"  # as "auto", without int8 that the file does not hold


def checked_forms(packing: str, **asked: str) -> dict[str, str]:
    """{kind: form or "auto"} without aliases. Raises ValueError for words that no form has."""
    _check_choice("packing", packing, PACKINGS)
    forms = {kind: ALIASES.get(form, form) for kind, form in asked.items()}
    for kind, form in forms.items():
        legal = FLOAT_FORMS if kind == "rows" else DENSE_FORMS[:-1]
        _check_choice(kind, form, (*legal, "auto"))
    return forms


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} {value!r} is unknown; legal values are {', '.join(legal)}")


def choose_forms(checkpoint: Checkpoint, packing: str, asked: dict[str, str]) -> Forms:
    """The forms of a checkpoint's matrices. "auto" is what the file holds exactly, where it holds
    int8 with scales; bf16 or f16 where every value is one; else f32, but in published ternary
    transformers int8 rows, of which the head has them always (`rounds_head`): rounding the
    embedding turns roundings of the int8 activations behind it. See `_settled` for what is asked.

    Raises ValueError for a form that the model's matrices cannot have.
    """
    config = checkpoint.config
    tied = _tied(checkpoint)
    legal = legal_forms(config, {"head": "f32"} if tied else None)
    asked = _settled(checkpoint, asked, legal)
    chosen = {kind: "f32" if form in ("auto", _EXACT) else form for kind, form in asked.items()}
    plan = Forms.of(config, ternary=packing, tied_head="f32" if tied else "none", **chosen)
    sources = _sources(checkpoint, plan)
    for kind, names in sources.items():
        chosen[kind] = _choose(checkpoint, kind, names, asked[kind], legal[kind])
    apart = chosen["head"] if tied and _own_head(asked, chosen) else "none"
    half = not config.scale_group or (
        _half_groups(checkpoint, plan) if checkpoint.found is None else checkpoint.found.half
    )
    scale = "f16" if half and _half_scales(checkpoint, sources, chosen) else "f32"
    return Forms.of(config, ternary=packing, scale=scale, tied_head=apart, **chosen)


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether a published model's head may have a matrix of its own though it is the embedding."""
    config = checkpoint.config
    dense = config.embedding_linear == config.head_kind == "dense"
    return checkpoint.found is not None and config.tie_embeddings and dense


def _own_head(asked: dict[str, str], chosen: dict[str, str]) -> bool:
    """Whether a tied head is stored apart: where it has another form, but not where the embedding
    was rounded, to int8, or came so."""
    if chosen["head"] == chosen["embedding"]:
        return False
    return asked["head"] != "auto" or chosen["embedding"] in FLOATS


def _sources(checkpoint: Checkpoint, forms: Forms) -> dict[str, list[str]]:
    """{kind of dense matrices: names of the tensors that it is made of}."""
    found: dict[str, list[str]] = {}
    for matrix in layout_of(checkpoint.config, forms, checkpoint.reading).matrices:
        if matrix.kind in KINDS and not matrix.packed:
            found.setdefault(matrix.kind, []).extend(matrix.sources)
    return found


def _settled(
    checkpoint: Checkpoint, asked: dict[str, str], legal: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """What is asked, of the matrices that there are: what is ternary stays so (with a warning), and
    where a head is to stay a float, its embedding is too; a tied one is the same matrix then."""
    if asked["head"] != "auto" and checkpoint.found is None:
        raise ValueError(f"head {asked['head']!r} is for published transformers")
    asked = dict(asked)
    for kind in ("head", "embedding"):
        ternary = legal.get(kind, PACKINGS) == PACKINGS
        if asked[kind] != "auto" and ternary:
            warnings.warn(f"the {kind} is ternary and is kept as it is", stacklevel=4)
            asked[kind] = "auto"
        if asked[kind] == "int8" and checkpoint.quantised(f"{kind}.weight") is not None:
            raise ValueError(
                f"{kind} 'int8': the source holds int8 with a scale for 32 inputs, which would be"
                " rounded again; 'auto' keeps it"
            )
    if asked["head"] in FLOATS and asked["embedding"] == "auto":
        asked["embedding"] = asked["head"] if _tied(checkpoint) else _EXACT
    return asked


def _choose(
    checkpoint: Checkpoint, kind: str, names: list[str], asked: str, legal: tuple[str, ...]
) -> str:
    if asked not in ("auto", _EXACT):
        return asked
    if _INT8 in legal and all(_is_int8(checkpoint, name) for name in names):
        return _INT8
    published = checkpoint.found is not None and checkpoint.config.linear == "ternary"
    if asked == "auto" and published and kind == "head":
        return "int8"
    short = _exact_short(checkpoint, names, legal)
    return short or ("int8" if published and asked == "auto" else "f32")


def _exact_short(checkpoint: Checkpoint, names: list[str], legal: tuple[str, ...]) -> str | None:
    """The 16-bit form that holds every value of these tensors exactly, if one does."""
    for form, exact in (("bf16", _is_bfloat16), ("f16", fits_float16)):
        if form in legal and all(_every(checkpoint, name, exact) for name in names):
            return form
    return None


def rounds_head(checkpoint: Checkpoint, forms: Forms, asked: dict[str, str]) -> bool:
    """Whether a head of its own becomes int8 rows though nobody asked: what that costs decides.

    asked: as `checked_forms` has it."""
    tied = checkpoint.config.tie_embeddings
    return asked["head"] == "auto" and forms.head == "int8" and not tied


def with_short_head(checkpoint: Checkpoint, forms: Forms) -> Forms:
    """The same forms, but the head in 16 bits: exactly if a type can, else float16, which rounds
    less, where its range is enough."""
    name = "head.weight"
    form = _exact_short(checkpoint, [name], DENSE_FORMS)
    if form is None:
        form = "f16" if _every(checkpoint, name, _in_float16) else "bf16"
    return dataclasses.replace(forms, head=form)


def _is_int8(checkpoint: Checkpoint, name: str) -> bool:
    held = checkpoint.quantised(name)
    return held is not None and held.kind == "int8" and held.group == 32


def _half_groups(checkpoint: Checkpoint, plan: Forms) -> bool:
    """Whether float16 holds the scales of all ternary matrices of a trained model."""
    matrices = layout_of(checkpoint.config, plan, checkpoint.reading).matrices
    held = [checkpoint.quantised(n) for matrix in matrices if matrix.packed for n in matrix.sources]
    return all(matrix is not None and fits_float16(matrix.scale) for matrix in held)


def _half_scales(
    checkpoint: Checkpoint, sources: dict[str, list[str]], chosen: dict[str, str]
) -> bool:
    """Whether float16 holds the scales of all matrices that are kept as int8 groups."""
    names = [n for kind, names in sources.items() if chosen[kind] == _INT8 for n in names]
    held = [checkpoint.quantised(name) for name in names]
    return all(matrix is not None and fits_float16(matrix.scale) for matrix in held)


def _every(checkpoint: Checkpoint, name: str, exact: Callable[[Floats], bool]) -> bool:
    return all(exact(block) for block in blocks(checkpoint, name))


def _is_bfloat16(values: Floats) -> bool:
    """Whether every value is one of bfloat16's."""
    return not np.any(values.view(np.uint32) & 0xFFFF)


def _in_float16(values: Floats) -> bool:
    """Whether float16 has no infinity for a value."""
    return bool(np.all(np.isfinite(to_float16(values))))
