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
from nomatmul.formats.packed.forms import (
    DENSE_FORMS,
    FLOAT_FORMS,
    INT8_GROUP,
    SCALE_FORMS,
    TREE_PACKING,
    Forms,
    attends,
    is_table,
    legal_forms,
)
from nomatmul.formats.packing import PACKINGS, row_bytes

__all__ = [
    "BESIDE_FILES",
    "CARD_FILE",
    "CONFIG_FILE",
    "DENSE_FORMS",
    "FLOAT_FORMS",
    "SCALE_FORMS",
    "TOKENIZER_FILE",
    "TREE_PACKING",
    "WEIGHTS_FILE",
    "Forms",
    "Layout",
    "Matrix",
    "Tensors",
    "check_packable",
    "layout_of",
    "legal_forms",
    "packed_tensors",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
# What a directory may hold beside its tokenizer. A checksum is kept of what `pack` copied; one that
# somebody put there later is taken as it is.
BESIDE_FILES = (TEMPLATE_FILE, GENERATION_FILE)

_DTYPES = {
    "f32": "F32",
    "bf16": "BF16",
    "f16": "F16",
    "int8": "I8",
    "int8-32": "I8",
    **dict.fromkeys(PACKINGS, "U8"),
}
# Where forms may mix, coarse alignment comes first: each tensor lies on a multiple of its items.
_ORDER = ("U8", "F32", "F16", "BF16", "I8")
_QKV = ("q_proj", "k_proj", "v_proj")

Tensors = dict[str, tuple[str, Shape]]


@dataclass(frozen=True)
class Matrix:
    """One matrix of the file and what lies beside it.

    name: of the tensor. kind: a field of Forms. shape: of its values, [N, K] or, for rows of trees,
    [R, 2, K]. sources: {tensor of a training checkpoint: its rows} that it is made of, one above
    the other or, for rows of trees, side by side. scale: the name of its scales, None for floats.
    scale_shape: of the scales: [blocks of rows] or [N, groups of inputs] of ternary ones, [2] of
    ternary trees, of int8 [rows], or of "int8-32" [N, K / 32]. scale_form: "f32" or "f16".
    beside: {name: shape} of float32 tensors that belong to it.
    """

    name: str
    kind: str
    form: str
    shape: Shape
    sources: dict[str, int]
    scale: str | None
    beside: dict[str, Shape]
    scale_shape: Shape = ()
    scale_form: str = "f32"

    def part(self, source: str) -> slice:
        """The rows of one of its sources, which lie one above the other."""
        first = 0
        for name, count in self.sources.items():
            if name == source:
                return slice(first, first + count)
            first += count
        raise KeyError(source)

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
    def stored_scale(self) -> Tensors:
        """{name: (safetensors dtype, shape)} of the scales in the file; nothing of floats."""
        return (
            {} if self.scale is None else {self.scale: (_DTYPES[self.scale_form], self.scale_shape)}
        )


@dataclass(frozen=True)
class Layout:
    """The matrices of a model, the embedding last, and {name: shape} of other float32 tensors.

    mixed: whether matrices and scales may have forms of any alignment."""

    matrices: tuple[Matrix, ...]
    vectors: dict[str, Shape]
    mixed: bool = False

    def tensors(self) -> Tensors:
        """{name: (safetensors dtype, shape)} in the order in which the file holds them.

        Matrices come first (the lengths of packed ones are multiples of 32 bytes, so each of them
        and each float32 behind them is aligned), then what is float32, the embedding last. Of a
        mixed one: packed matrices, float32, what has two bytes, int8.
        """
        *matrices, embedding = self.matrices
        found = {matrix.name: matrix.stored for matrix in matrices}
        for matrix in matrices:
            found |= matrix.stored_scale | _floats(matrix.beside)
        found |= _floats(self.vectors) | embedding.stored_scale
        found[embedding.name] = embedding.stored
        if not self.mixed:
            return found
        return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[1][0])))

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
    matrices.append(_embedding(model, forms))
    vectors = model.norm_tensors() | model.mixer_tensors()
    if is_table(model, forms):
        vectors |= {f"head.{key}": shape for key, shape in model.head.tensors().items()}
    vectors |= {name: (size,) for name, size in model.lower_bounds().items()}
    if model.sinusoidal:
        vectors["position_scale"] = (1,)
    return Layout(tuple(matrices), vectors, mixed=attends(model))


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
        if not (linear.tied and is_table(model, forms)):
            stacks.setdefault(_stack_of(name, linear, reading is None), {})[name] = linear
    for name, parts in stacks.items():
        linear = next(iter(parts.values()))
        kind = "head" if name == "head" and forms.head != "none" else linear.kind
        shape = (sum(part.outputs for part in parts.values()), linear.inputs)
        yield _matrix(
            name,
            kind,
            forms,
            shape,
            sources={f"{source}.weight": part.outputs for source, part in parts.items()},
            beside={
                **{f"{name}.{key}": s for key, s in linear.tensors().items() if key != "weight"},
                **{key: s for key, s in biases.items() if key == f"{name}.bias"},
            },
            ternary_scale=linear.scale_shape,
        )


def _embedding(model: Architecture, forms: Forms) -> Matrix:
    table = model.embedding
    shape, sources = (table.vocabulary, table.size), {"embedding.weight": table.vocabulary}
    scale = table.scale_shape if table.kind == "ternary" else ()
    return _matrix("embedding", "embedding", forms, shape, sources, {}, scale)


def _matrix(
    name: str,
    kind: str,
    forms: Forms,
    shape: tuple[int, int],
    sources: dict[str, int],
    beside: dict[str, Shape],
    ternary_scale: Shape,
) -> Matrix:
    """The matrix of the linear, or table, `name`; ternary_scale: shape of its scales if it is
    ternary."""
    form = getattr(forms, kind)
    rows, columns = shape
    scale_shape = {"int8": (rows,), "int8-32": (rows, columns // INT8_GROUP)}
    scale_shape |= dict.fromkeys(PACKINGS, ternary_scale)
    found = scale_shape.get(form)
    return Matrix(
        name=f"{name}.packed" if form in PACKINGS else f"{name}.weight",
        kind=kind,
        form=form,
        shape=shape,
        sources=sources,
        scale=None if found is None else f"{name}.scale",
        beside=beside,
        scale_shape=found or (),
        scale_form=forms.scale if found is not None and len(found) == 2 else "f32",
    )


def _stack_of(name: str, linear: Linear, causal: bool) -> str:
    """The name under which a linear is stored: an encoder's dense q, k and v are one matrix."""
    base, _, last = name.rpartition(".")
    return f"{base}.qkv_proj" if not causal and linear.kind == "dense" and last in _QKV else name


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
            scale_shape=(2,) if ternary else (trees.rows, 2),
        )


def _floats(shapes: dict[str, Shape]) -> Tensors:
    return {name: ("F32", shape) for name, shape in shapes.items()}
