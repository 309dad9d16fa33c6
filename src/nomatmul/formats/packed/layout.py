"""What a packed model directory holds: names, dtypes, shapes and order of its tensors.

Walks the table of parts (`architecture`), so that decoders and encoders are one container.
docs/formats.md describes the format. Legend: V vocabulary, D hidden size, N/K rows and
columns of a linear, R rows of a layer's trees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from nomatmul.formats import capability
from nomatmul.formats.architecture import Architecture, Linear, Shape, architecture_of
from nomatmul.formats.chat_template import TEMPLATE_FILE
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderReading, head_shapes
from nomatmul.formats.errors import FormatError
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.packing import PACKINGS, row_bytes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
# What a directory may hold beside its tokenizer. A checksum is kept of what `pack` copied; one that
# somebody put there later is taken as it is.
BESIDE_FILES = (TEMPLATE_FILE, GENERATION_FILE)

FLOAT_FORMS = ("f32", "bf16", "int8")
# The rows of ternary trees are read one by one, at random: always in the form that is quickest to
# unpack.
TREE_PACKING = "2bit"

_DTYPES = {"f32": "F32", "bf16": "BF16", "int8": "I8"} | dict.fromkeys(PACKINGS, "U8")
_QKV = ("q_proj", "k_proj", "v_proj")

Tensors = dict[str, tuple[str, Shape]]


@dataclass(frozen=True)
class Forms:
    """How the matrices of a model are stored, by kind; "none" where it has none.

    ternary: "2bit" or "1.6bit", with one float32 scale a tensor. dense, rows (of trees) and
    embedding: "f32", "bf16", or "int8" with a float32 scale a row; ternary trees have "2bit".
    """

    embedding: str
    ternary: str = "none"
    dense: str = "none"
    rows: str = "none"

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        ternary: str = "2bit",
        dense: str = "f32",
        rows: str = "f32",
        embedding: str = "bf16",
    ) -> Forms:
        """Those of these forms that a model has matrices for. Raises ValueError as `check`."""
        asked = {"ternary": ternary, "dense": dense, "rows": rows, "embedding": embedding}
        legal = legal_forms(config)
        if legal.get("rows") == (TREE_PACKING,):
            asked["rows"] = TREE_PACKING
        forms = cls(**{kind: asked[kind] for kind in legal})
        forms.check(config)
        return forms

    def to_dict(self) -> dict[str, str]:
        """{kind: form} of the kinds that the model has."""
        return {kind: form for kind, form in vars(self).items() if form != "none"}

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError, naming it, for a form that the model's matrices cannot have."""
        legal, given = legal_forms(config), self.to_dict()
        for kind in sorted(set(legal) ^ set(given)):
            word = "needs" if kind in legal else "has no matrix of"
            raise ValueError(f"the model {word} form {kind!r}")
        for kind, form in given.items():
            if form not in legal[kind]:
                choices = ", ".join(map(repr, legal[kind]))
                raise ValueError(f"{kind} form {form!r} is unknown; legal values are {choices}")


def legal_forms(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """{kind of matrices that the model has: the forms that they may have}."""
    model = architecture_of(config)
    kinds = {linear.kind for linear in model.linears().values()}
    found: dict[str, tuple[str, ...]] = {"ternary": PACKINGS} if "ternary" in kinds else {}
    if "dense" in kinds:
        found["dense"] = FLOAT_FORMS
    for trees in model.trees().values():
        found["rows"] = (TREE_PACKING,) if trees.linear == "ternary" else FLOAT_FORMS
    return {**found, "embedding": FLOAT_FORMS}


@dataclass(frozen=True)
class Matrix:
    """One matrix of the file and what lies beside it.

    name: of the tensor. kind: a field of Forms. shape: of its values, [N, K] or, for rows of trees,
    [R, 2, K]. sources: {tensor of a training checkpoint: its rows} that it is made of, one above
    the other or, for rows of trees, side by side. scale: the name of its scales, None for floats.
    beside: {name: shape} of float32 tensors that belong to it.
    """

    name: str
    kind: str
    form: str
    shape: Shape
    sources: dict[str, int]
    scale: str | None
    beside: dict[str, Shape]

    @property
    def packed(self) -> bool:
        """Whether it holds ternary codes."""
        return self.form in PACKINGS

    @property
    def stored(self) -> tuple[str, Shape]:
        """(safetensors dtype, shape) in the file."""
        columns = row_bytes(self.shape[-1], self.form) if self.packed else self.shape[-1]
        return _DTYPES[self.form], (*self.shape[:-1], columns)

    @property
    def scale_shape(self) -> Shape:
        """[tensors] of ternary ones, a scale a row of int8."""
        return (len(self.sources),) if self.packed else self.shape[:-1]


@dataclass(frozen=True)
class Layout:
    """The matrices of a model, the embedding last, and {name: shape} of other float32 tensors."""

    matrices: tuple[Matrix, ...]
    vectors: dict[str, Shape]

    def tensors(self) -> Tensors:
        """{name: (safetensors dtype, shape)} in the order in which the file holds them.

        Matrices come first (the lengths of packed ones are multiples of 32 bytes, so each of them
        and each float32 behind them is aligned), then what is float32, the embedding last.
        """
        *matrices, embedding = self.matrices
        found = {matrix.name: matrix.stored for matrix in matrices}
        for matrix in matrices:
            found |= _floats(_scales(matrix) | matrix.beside)
        found |= _floats(self.vectors | _scales(embedding))
        return {**found, embedding.name: embedding.stored}

    def scales(self) -> set[str]:
        """Names of the tensors that hold scales."""
        return {matrix.scale for matrix in self.matrices if matrix.scale is not None}

    def codes(self) -> dict[str, tuple[int, str]]:
        """{name of a tensor of ternary codes: (true length of its rows, their form)}."""
        return {m.name: (m.shape[-1], m.form) for m in self.matrices if m.packed}


def check_packable(config: ModelConfig, reading: EncoderReading | None) -> None:
    """Raise ValueError, naming the part, for a model that no packed directory can hold."""
    if config.causal != (reading is None):
        word = "a causal model has no" if config.causal else "an encoder needs a"
        raise FormatError(f"{word} task head (causal is {str(config.causal).lower()})")
    capability.check(config, "packed")


@functools.lru_cache(maxsize=64)
def layout_of(config: ModelConfig, forms: Forms, reading: EncoderReading | None = None) -> Layout:
    """What the directory of a model holds; reading: of an encoder, what it is for.

    Raises ValueError for a model that cannot be packed or a form that it cannot have.
    """
    check_packable(config, reading)
    forms.check(config)
    model = architecture_of(config)
    matrices = [*_linears(model, forms, reading), *_trees(model, forms)]
    table = {"embedding.weight": model.vocabulary}
    shape = (model.vocabulary, model.size)
    scale = "embedding.scale" if forms.embedding == "int8" else None
    matrices.append(
        Matrix("embedding.weight", "embedding", forms.embedding, shape, table, scale, {})
    )
    vectors = model.norm_tensors() | model.mixer_tensors()
    vectors |= {name: (size,) for name, size in model.lower_bounds().items()}
    if model.sinusoidal:
        vectors["position_scale"] = (1,)
    return Layout(tuple(matrices), vectors)


def packed_tensors(
    config: ModelConfig, forms: Forms, reading: EncoderReading | None = None
) -> Tensors:
    """{name: (safetensors dtype, shape)} of a model; see `Layout.tensors`."""
    return layout_of(config, forms, reading).tensors()


def _linears(model: Architecture, forms: Forms, reading: EncoderReading | None) -> Iterator[Matrix]:
    linears = model.linears()
    biases: dict[str, Shape] = {}
    if reading is not None and reading.task != "masked":
        del linears["head"]
        for name, (outputs, inputs) in head_shapes(model.size, reading).items():
            linears[name] = Linear("dense", outputs, inputs, None)
            biases[f"{name}.bias"] = (outputs,)
    stacks: dict[str, dict[str, Linear]] = {}
    for name, linear in linears.items():
        if not (linear.tied and linear.kind == "dense"):  # the embedding serves
            stacks.setdefault(_stack_of(name, linear), {})[name] = linear
    for name, parts in stacks.items():
        linear = next(iter(parts.values()))
        ternary = linear.kind == "ternary"
        form = forms.ternary if ternary else forms.dense
        inside = {f"{name}.{key}": s for key, s in linear.tensors().items() if key != "weight"}
        inside |= {key: s for key, s in biases.items() if key == f"{name}.bias"}
        yield Matrix(
            name=f"{name}.packed" if ternary else f"{name}.weight",
            kind=linear.kind,
            form=form,
            shape=(sum(part.outputs for part in parts.values()), linear.inputs),
            sources={f"{source}.weight": part.outputs for source, part in parts.items()},
            scale=f"{name}.scale" if ternary or form == "int8" else None,
            beside=inside,
        )


def _stack_of(name: str, linear: Linear) -> str:
    """The name under which a linear is stored: dense q, k and v are one matrix."""
    base, _, last = name.rpartition(".")
    return f"{base}.qkv_proj" if linear.kind == "dense" and last in _QKV else name


def _trees(model: Architecture, forms: Forms) -> Iterator[Matrix]:
    for name, trees in model.trees().items():
        ternary = trees.linear == "ternary"
        scale = f"{name}.rows.scale" if ternary else f"{name}.row_scale"
        own = trees.own_tensors()
        yield Matrix(
            name=f"{name}.rows.packed" if ternary else f"{name}.rows",
            kind="rows",
            form=forms.rows,
            shape=(trees.rows, 2, trees.size),
            sources={f"{name}.{key}": trees.rows for key in ("w_in", "w_out")},
            scale=scale if ternary or forms.rows == "int8" else None,
            beside={f"{name}.{k}": s for k, s in own.items() if k not in ("w_in", "w_out")},
        )


def _scales(matrix: Matrix) -> dict[str, Shape]:
    return {} if matrix.scale is None else {matrix.scale: matrix.scale_shape}


def _floats(shapes: dict[str, Shape]) -> Tensors:
    return {name: ("F32", shape) for name, shape in shapes.items()}
