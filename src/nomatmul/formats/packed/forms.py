"""How the matrices of a packed model are stored, by kind, and which forms a model's may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nomatmul.formats.architecture import Architecture, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packing import PACKINGS

FLOAT_FORMS = ("f32", "bf16", "int8")
# Of decoders with attention; "int8-32" has a scale for each 32 inputs of a row.
DENSE_FORMS = ("f32", "bf16", "f16", "int8", "int8-32")
INT8_GROUP = 32
SCALE_FORMS = ("f32", "f16")
# The rows of ternary trees are read one by one, at random: always in the form that is quickest to
# unpack.
TREE_PACKING = "2bit"


@dataclass(frozen=True)
class Forms:
    """How the matrices of a model are stored, by kind; "none" where it has none.

    ternary: "2bit" or "1.6bit". dense, rows (of trees) and embedding: "f32", "bf16", or "int8" with
    a float32 scale a row; ternary trees have "2bit". In decoders with attention also "f16" and
    "int8-32", and a ternary embedding has the forms of `ternary`. head, there: of a dense head that
    is not tied. A tied one has the embedding's matrix or, where `head` is not "none", one of its
    own, made of the same rows. scale: of scales that stand for a group of inputs, "f32" or "f16".
    """

    embedding: str
    ternary: str = "none"
    dense: str = "none"
    rows: str = "none"
    head: str = "none"
    scale: str = "none"

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        ternary: str = "2bit",
        dense: str = "f32",
        rows: str = "f32",
        embedding: str = "bf16",
        head: str = "f32",
        scale: str = "f32",
        tied_head: str = "none",
    ) -> Forms:
        """Those of these forms that a model has matrices for; a ternary embedding has that of
        `ternary` whatever is said of it. head: of one that is not tied; tied_head: of a dense one
        that is. Raises ValueError as `check`."""
        asked = {"ternary": ternary, "dense": dense, "rows": rows, "embedding": embedding}
        asked |= {"head": tied_head if config.tie_embeddings else head, "scale": scale}
        legal = legal_forms(config, asked)
        if legal.get("rows") == (TREE_PACKING,):
            asked["rows"] = TREE_PACKING
        if legal["embedding"] == PACKINGS:
            asked["embedding"] = ternary
        legal = legal_forms(config, asked)
        forms = cls(**{kind: asked[kind] for kind in legal})
        forms.check(config)
        return forms

    def to_dict(self) -> dict[str, str]:
        """{kind: form} of the kinds that the model has."""
        return {kind: form for kind, form in vars(self).items() if form != "none"}

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError, naming it, for a form that the model's matrices cannot have."""
        given = self.to_dict()
        legal = legal_forms(config, given)
        for kind, form in given.items():
            if form not in legal.get(kind, (form,)):
                choices = ", ".join(map(repr, legal[kind]))
                raise ValueError(f"{kind} form {form!r} is unknown; legal values are {choices}")
        for kind in sorted(set(legal) ^ set(given)):
            word = "needs" if kind in legal else "has no matrix of"
            raise ValueError(f"the model {word} form {kind!r}")


def legal_forms(
    config: ModelConfig, given: Mapping[str, object] | None = None
) -> dict[str, tuple[str, ...]]:
    """{kind of matrices that the model has: the forms that they may have}; "scale" is one where the
    model has scales of groups, or a form in `given` does."""
    model = architecture_of(config)
    linears = model.linears()
    if attends(model):
        return _attention_forms(model, config.scale_group, given or {})
    kinds = {linear.kind for linear in linears.values()}
    found: dict[str, tuple[str, ...]] = {"ternary": PACKINGS} if "ternary" in kinds else {}
    if "dense" in kinds:
        found["dense"] = FLOAT_FORMS
    for trees in model.trees().values():
        found["rows"] = (TREE_PACKING,) if trees.linear == "ternary" else FLOAT_FORMS
    return {**found, "embedding": FLOAT_FORMS}


def is_table(model: Architecture, forms: Forms) -> bool:
    """Whether the embedding's matrix serves as the head's."""
    tied = model.head.tied and model.head.kind == model.embedding.kind
    return tied and forms.head == "none"


def attends(model: Architecture) -> bool:
    """Whether it is a decoder with attention, whose matrices may have more forms."""
    return any(piece.grows for block in model.blocks for piece in block.mixer.state())


def _attention_forms(
    model: Architecture, scale_group: int, given: Mapping[str, object]
) -> dict[str, tuple[str, ...]]:
    linears = model.linears()
    head = linears.pop("head")
    found: dict[str, tuple[str, ...]] = {}
    if "ternary" in {linear.kind for linear in (*linears.values(), head)}:
        found["ternary"] = PACKINGS
    inputs = {linear.inputs for linear in linears.values() if linear.kind == "dense"}
    if inputs:
        found["dense"] = _dense(*inputs)
    if model.trees():
        found["rows"] = (TREE_PACKING,)
    if head.kind == "dense" and (not head.tied or given.get("head", "none") != "none"):
        found["head"] = _dense(head.inputs)
    ternary = model.embedding.kind == "ternary"
    found["embedding"] = PACKINGS if ternary else _dense(model.size)
    if scale_group or "int8-32" in [given.get(kind) for kind in found]:
        found["scale"] = SCALE_FORMS
    return found


def _dense(*inputs: int) -> tuple[str, ...]:
    fits = all(size % INT8_GROUP == 0 for size in inputs)
    return DENSE_FORMS if fits else tuple(form for form in DENSE_FORMS if form != "int8-32")
