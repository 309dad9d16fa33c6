"""Writing a model as one GGUF file: types of its tensors, their rows, the metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nomatmul.convert.export_scales import Rounding
from nomatmul.convert.exportable import ExportSource, steps
from nomatmul.formats.files.gguf_encode import (
    WRITTEN,
    encode_floats,
    encode_integers,
)
from nomatmul.formats.files.gguf_types import Bytes
from nomatmul.formats.files.gguf_write import GgufRows, write_gguf
from nomatmul.formats.files.quantised import Quantised
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
from nomatmul.formats.quantise import fits_float16, quantise_rows, to_bfloat16, to_float16

TYPES = ("auto", "tq2_0", "pq2_0", "q2_0")
EMBEDDINGS = ("auto", "f32", "f16", "bf16", "q8_0")
_BY_GROUP = {0: "TQ2_0", 256: "TQ2_0", 128: "PQ2_0", 64: "Q2_0"}
_INT8_GROUP = 32
# What llama.cpp makes of the inputs of a product with these types.
ACTIVATIONS = {"TQ2_0": "int8 for each 256 inputs", "Q2_0": "int8 for each 32 inputs"}
ACTIVATIONS["PQ2_0"] = ACTIVATIONS["Q2_0"]

Progress = Callable[[int, int, str], None]


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
        whole = shape[-1] % _INT8_GROUP == 0
        if len(shape) == 1:
            return GgufRows(stored, shape, "F32", lambda: self._floats("F32"))
        if kind == "int8" and whole and asked in ("auto", "q8_0"):
            return GgufRows(stored, shape, "Q8_0", lambda: self._integers("Q8_0"))
        if asked == "q8_0" and not whole:
            raise ValueError(
                f"--embedding q8_0: {self.tensor.name} has rows of {shape[-1]} numbers, which the"
                f" {_INT8_GROUP} of a block do not divide (f16 can)"
            )
        name = self._float_type() if asked == "auto" else asked.upper()
        if name == "Q8_0":
            return GgufRows(stored, shape, name, self._rounded_rows)
        return GgufRows(stored, shape, name, lambda: self._floats(name))

    def _float_type(self) -> str:
        """What holds the values in 16 bits: exactly, else rounded, to float16 if it can."""
        half = brain = small = True
        for block in self._blocks():
            half = half and fits_float16(block)
            brain = brain and not np.any(block.view(np.uint32) & 0xFFFF)
            small = small and bool(np.isfinite(to_float16(block)).all())
        return "F16" if half or (small and not brain) else "BF16"

    def _blocks(self) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Rows as float32, those of whole numbers multiplied out."""
        if self.source.kind(self.tensor) == "float":
            blocks = self.source.floats(self.tensor)
            assert self.unit == 1 or len(self.tensor.shape) == 2
        else:
            held = self.source.quantised(self.tensor)
            blocks = (held.floats(rows) for rows in steps(self.tensor.shape))
        yield from blocks

    def _floats(self, name: str) -> Iterator[Bytes]:
        changed, largest = 0.0, 0.0
        for block in self._in_order(self._blocks()):
            if name == "F16" and not np.isfinite(to_float16(block)).all():
                raise ValueError(
                    f"{self.tensor.name}: float16 cannot hold {np.abs(block).max():g}, only up to"
                    " 65504 (--embedding bf16 can)"
                )
            if name != "F32":
                kept = _kept(name, block)
                changed = max(changed, float(np.abs(kept - block).max(initial=0.0)))
                largest = max(largest, float(np.abs(block).max(initial=0.0)))
            yield encode_floats(name, block)
        if changed:
            self._note(name, changed, largest)

    def _rounded_rows(self) -> Iterator[Bytes]:
        changed, largest = 0.0, 0.0
        for block in self._in_order(self._blocks()):
            values, scale = quantise_rows(block.reshape(-1, _INT8_GROUP))
            half = to_float16(scale)
            kept = values * half.astype(np.float32)[:, None]
            changed = max(changed, float(np.abs(kept.reshape(block.shape) - block).max()))
            largest = max(largest, float(np.abs(block).max()))
            count = block.shape[1] // _INT8_GROUP
            yield encode_integers("Q8_0", values.reshape(block.shape), half.reshape(-1, count))
        self._note("Q8_0", changed, largest)

    def _note(self, name: str, changed: float, largest: float) -> None:
        words = f"rounded to {name}, by at most {changed:.2e} of values up to {largest:.3g}"
        self.rounding.floats[self.tensor.name] = words

    def _in_order(
        self, blocks: Iterator[np.ndarray[Any, np.dtype[np.float32]]]
    ) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Floats in the order in which the file has them; a permuted matrix is held whole."""
        if self.unit == 1:
            yield from blocks
            return
        whole = np.concatenate(list(blocks))
        for rows in steps(whole.shape, self.unit):
            yield whole[rows][self._order(rows)]

    def _integers(self, name: str) -> Iterator[Bytes]:
        held: Quantised = self.source.quantised(self.tensor)
        held = held.grouped(WRITTEN[name].group)
        for rows in steps(held.shape, self.unit):
            values, scale = held.read(rows), held.rows_scale(rows)
            half = self.rounding.half(self.tensor.name, scale)
            if self.unit > 1:
                values, half = values[self._order(rows)], half[self._order(rows)]
            yield encode_integers(name, values, half)

    def _order(self, rows: slice) -> np.ndarray[Any, np.dtype[np.int64]]:
        heads = np.arange(0, rows.stop - rows.start, self.unit)[:, None]
        return (heads + stored_order(self.unit)).reshape(-1)


def _kept(name: str, block: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
    from nomatmul.formats.quantise import from_bfloat16

    if name == "BF16":
        return from_bfloat16(to_bfloat16(block))
    return to_float16(block).astype(np.float32)
