"""Writing a model as one GGUF file: types of its tensors, their rows, the metadata."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.export_rounding import INT8_GROUP, Rounding, exact_type, stored_floats
from nomatmul.convert.exportable import ExportSource, steps
from nomatmul.convert.matrices import Floats
from nomatmul.convert.progress import Progress
from nomatmul.formats.files.gguf_blocks import Bytes
from nomatmul.formats.files.gguf_encode import WRITTEN, encode_floats, encode_integers
from nomatmul.formats.files.gguf_write import GgufRows, write_gguf
from nomatmul.formats.published.gguf_metadata import architecture_metadata, rotary_divisors
from nomatmul.formats.published.gguf_tensors import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    is_permuted,
    stored_order,
    stored_tensors,
)
from nomatmul.formats.published.llama_write import (
    PublishedTensor,
    has_own_head,
    published_config,
)
from nomatmul.formats.quantise import to_float16

TYPES = ("auto", "tq2_0", "pq2_0", "q2_0")
EMBEDDINGS = ("auto", "f32", "f16", "bf16", "q8_0")
_BY_GROUP = {0: "TQ2_0", 256: "TQ2_0", 128: "PQ2_0", 64: "Q2_0"}
# What llama.cpp, or its fork that reads PQ2_0, makes of the inputs of a product with these types.
ACTIVATIONS = {
    "TQ2_0": "int8 for each 256 inputs",
    "Q2_0": "int8 for each 32 inputs",
    "PQ2_0": "int8 for groups of inputs",
}


def ternary_type(source: ExportSource, asked: str) -> str:
    """The type of ternary matrices, "" where the model has none; asked: of TYPES.

    Raises ValueError, naming the matrix and the alternative, where it does not hold them exactly.
    """
    matrices = {n: t for n, t in source.tensors.items() if source.kind(t) == "ternary"}
    group = source.config.scale_group
    if not matrices:
        if asked != "auto":
            raise ValueError(f"--type {asked} is for ternary models; {source.path} is dense")
        return ""
    kind = _BY_GROUP.get(group) if asked == "auto" else asked.upper()
    if kind is None or (group and group % WRITTEN[kind].group):
        what = "no GGUF type" if kind is None else f"no {kind}"
        raise ValueError(
            f"{source.path} has a scale for each {group} inputs, which {what} holds exactly"
            f" ({_alternatives(group, set())})"
        )
    for name, tensor in matrices.items():
        width = tensor.shape[1]
        if width % WRITTEN[kind].group:
            others = _alternatives(group, {other.shape[1] for other in matrices.values()})
            raise ValueError(
                f"{name} has rows of {width} inputs, which the {WRITTEN[kind].group} of a block of"
                f" {kind} do not divide ({others})"
            )
    return kind


def _alternatives(group: int, widths: set[int]) -> str:
    fitting = [
        f"--type {kind}"
        for kind in TYPES[1:]
        if not group % WRITTEN[kind.upper()].group
        and not any(width % WRITTEN[kind.upper()].group for width in widths)
    ]
    return " or ".join([*fitting, "--to unpacked"])


def export_gguf(
    source: ExportSource,
    out: Path,
    *,
    kind: str,
    embedding: str,
    vocabulary: dict[str, Any],
    progress: Progress,
) -> Rounding:
    """Write the file; kind: `ternary_type`'s answer, vocabulary: the tokenizer's metadata.

    Raises ValueError for what a GGUF file cannot say, before anything is written.
    """
    values = published_config(source.config, "float32")
    name = out.name.removesuffix(".gguf")
    metadata = architecture_metadata(source.config, values, name, kind or "F16") | vocabulary
    divisors, rounding = rotary_divisors(source.config), Rounding()
    tensors = []
    for stored, published, shape in stored_tensors(values, own_head=has_own_head(source.config)):
        tensor = source.tensors[published]
        assert tensor.shape == shape
        permuted = source.family == "llama" and is_permuted(stored)
        unit = source.config.head_size if permuted else 1
        outer = stored in (EMBEDDING, HEAD)
        rows = _Rows(source, tensor, unit, rounding)
        tensors.append(rows.as_type(stored, kind, embedding if outer else "auto"))
    if divisors is not None:
        table = encode_floats("F32", divisors)
        tensors.append(GgufRows(ROPE_FACTORS, divisors.shape, "F32", lambda: [table]))
    write_gguf(out, metadata, tensors, progress)
    return rounding


class _Rows:
    """A tensor of the model as rows of one of GGUF's types; unit: rows of a head whose rows
    llama.cpp permutes, else 1."""

    def __init__(
        self, source: ExportSource, tensor: PublishedTensor, unit: int, rounding: Rounding
    ) -> None:
        self.source, self.tensor, self.unit, self.rounding = source, tensor, unit, rounding

    def as_type(self, stored: str, ternary: str, asked: str) -> GgufRows:
        """ternary: the type of ternary matrices; asked: that of floats, of EMBEDDINGS."""
        kind, shape = self.source.kind(self.tensor), self.tensor.shape
        if kind == "ternary":
            return GgufRows(stored, shape, ternary, lambda: self._integers(ternary))
        if len(shape) == 1:
            return GgufRows(stored, shape, "F32", lambda: self._floats("F32"))
        whole = shape[1] % INT8_GROUP == 0
        if kind == "int8" and whole and asked in ("auto", "q8_0"):
            return GgufRows(stored, shape, "Q8_0", lambda: self._integers("Q8_0"))
        if asked == "q8_0" and not whole:
            raise ValueError(
                f"--embedding q8_0: {self.tensor.name} has rows of {shape[1]} numbers, which the"
                f" {INT8_GROUP} of a block do not divide (f16 can)"
            )
        name = self._short_type() if asked == "auto" else asked.upper()
        return GgufRows(stored, shape, name, lambda: self._floats(name))

    def _short_type(self) -> str:
        """The 16-bit type that holds the values exactly, else float16 where its range is enough."""
        exact = exact_type(self._blocks())
        if exact != "F32":
            return exact
        small = all(np.isfinite(to_float16(block)).all() for block in self._blocks())
        return "F16" if small else "BF16"

    def _floats(self, name: str) -> Iterator[Bytes]:
        blocks = self._blocks() if self.unit == 1 else self._permuted()
        return stored_floats(self.tensor.name, name, blocks, self.rounding)

    def _blocks(self) -> Iterator[Floats]:
        """Rows as float32, those of whole numbers multiplied out."""
        if self.source.kind(self.tensor) == "float":
            yield from self.source.floats(self.tensor)
            return
        held = self.source.quantised(self.tensor)
        yield from (held.floats(rows) for rows in steps(self.tensor.shape))

    def _permuted(self) -> Iterator[Floats]:
        """A matrix of floats, which is held whole, in the order of rows of the file."""
        whole = np.concatenate(list(self._blocks()))
        yield from (whole[rows][self._order(rows)] for rows in steps(whole.shape, self.unit))

    def _integers(self, name: str) -> Iterator[Bytes]:
        held = self.source.quantised(self.tensor).grouped(WRITTEN[name].group)
        for rows in steps(held.shape, self.unit):
            values, scale = held.read(rows), held.rows_scale(rows)
            half = self.rounding.half(self.tensor.name, scale)
            if self.unit > 1:
                values, half = values[self._order(rows)], half[self._order(rows)]
            yield encode_integers(name, values, half)

    def _order(self, rows: slice) -> NDArray[np.int64]:
        heads = np.arange(0, rows.stop - rows.start, self.unit)[:, None]
        order: NDArray[np.int64] = (heads + stored_order(self.unit)).reshape(-1)
        return order
