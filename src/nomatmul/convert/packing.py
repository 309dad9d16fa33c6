"""Pack a model: each of its matrices in its form, ternary ones quantised once.

The source is read and quantised a block of rows at a time, so the peak memory is a few blocks,
whatever the size of the model (a pickled `pytorch_model.bin` is mapped by torch instead).

Legend: L layers, D hidden size, N/K rows and columns of a matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.check import CheckText, EncoderCheck, PackCheck, check_packed
from nomatmul.convert.source import find_checkpoint, prepare_tokenizer
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.files.directory import directory_bytes
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed import FLOAT_FORMS, Forms, PackedWriter
from nomatmul.formats.packed.layout import CONFIG_FILE, Matrix, layout_of, legal_forms
from nomatmul.formats.packing import PACKINGS
from nomatmul.formats.quantise import absmean_scale, quantise_rows, ternarise, to_bfloat16

Floats = NDArray[np.float32]
Progress = Callable[[int, int, str], None]

_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class PackResult:
    """What `pack` did. Sizes are bytes of files; `tokenizer` is "copied", "converted" or "none".

    Of an encoder `packing` is "none", and rows and dense say how those are kept. `ignored_keys` are
    those of a published config.json that nobody here knows.
    """

    destination: str
    packing: str
    embedding: str
    parameters: int
    source_bytes: int
    packed_bytes: int
    tokenizer: str
    seconds: float
    check: PackCheck | EncoderCheck | None
    rows: str | None = None
    dense: str | None = None
    ignored_keys: tuple[str, ...] = ()


def pack(
    src: str | Path,
    dst: str | Path,
    *,
    packing: str = "2bit",
    embedding: str = "auto",
    rows: str = "auto",
    dense: str = "auto",
    check: bool = True,
    check_text: str | Path | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Write the packed form of the model in `src` to the new directory `dst`.

    src: a training checkpoint, the directory of a training run (its latest model is taken), or a
    published model. packing: "2bit" or "1.6bit". embedding: "f32", "bf16", "int8" (one scale a
    row), or "auto": bf16 where that loses nothing, else f32. Rounding an embedding of 32 bits
    moves logits by some percent, because the int8 activations behind it round differently.
    rows, dense: of an encoder, how the rows of its FFFs and its dense matrices are kept: "f32",
    "bf16" or "int8" (one scale a row); "auto" is f32 or, where that loses nothing, bf16. `packing`
    does not concern encoders.
    check: compare packed and source logits on `check_text` (a file; None: a built-in paragraph).
    progress: called with (done, total, tensor name).
    Raises ValueError when `src` is damaged, already packed, dense, or holds weights that are not
    finite; when `dst` exists; OSError when the disk is full. Nothing is left under `dst` then.
    """
    _check_choice("packing", packing, PACKINGS)
    asked = {"embedding": embedding, "rows": rows, "dense": dense}
    for kind, form in asked.items():
        _check_choice(kind, form, (*FLOAT_FORMS, "auto"))
    start = time.perf_counter()
    # A wrong file name is reported before the work, not after it.
    text = CheckText.read(check_text) if check else None
    source, target = find_checkpoint(Path(src)), Path(dst)
    if "format" in read_json_object(source / CONFIG_FILE):
        raise ValueError(f"{src} is packed already; give the checkpoint that it was made of")
    checkpoint = open_checkpoint(source)
    config, reading = checkpoint.config, checkpoint.reading
    if reading is None:
        _refuse_unsuitable(checkpoint, src, asked)
    forms = _forms(checkpoint, packing, asked)
    with (
        prepare_tokenizer(source, config) as (tokenizer_path, tokenizer_kind),
        PackedWriter(target, config, forms, reading, tokenizer_path) as writer,
    ):
        _write_tensors(checkpoint, writer, progress or _silent)
    return PackResult(
        destination=str(target),
        packing=forms.ternary,
        embedding=forms.embedding,
        parameters=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
        source_bytes=directory_bytes(source),
        packed_bytes=directory_bytes(target),
        tokenizer=tokenizer_kind,
        seconds=time.perf_counter() - start,
        check=check_packed(checkpoint, target, text) if text is not None else None,
        rows=None if reading is None or forms.rows == "none" else forms.rows,
        dense=None if forms.dense == "none" else forms.dense,
        ignored_keys=checkpoint.ignored,
    )


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} {value!r} is unknown; legal values are {', '.join(legal)}")


def _refuse_unsuitable(checkpoint: Checkpoint, src: str | Path, asked: dict[str, str]) -> None:
    if checkpoint.config.linear != "ternary":
        raise ValueError(f"{src} is a dense model: there is nothing ternary to pack")
    for name in ("rows", "dense"):
        if asked[name] != "auto":
            raise ValueError(
                f"{name} {asked[name]!r} is for encoders; {src} is a ternary language model"
            )


def _silent(done: int, total: int, name: str) -> None:
    """Progress that nobody watches."""


def _forms(checkpoint: Checkpoint, packing: str, asked: dict[str, str]) -> Forms:
    """ "auto" is what loses nothing: bf16 where every value is one of bfloat16's, else f32."""
    config = checkpoint.config
    chosen = {kind: "f32" if form == "auto" else form for kind, form in asked.items()}
    forms = Forms.of(config, ternary=packing, **chosen)
    matrices = layout_of(config, forms, checkpoint.reading).matrices
    for kind, legal in legal_forms(config).items():
        if asked.get(kind) == "auto" and "bf16" in legal:
            sources = [s for m in matrices if m.kind == kind for s in m.sources]
            if all(_is_bfloat16(checkpoint, source) for source in sources):
                forms = dataclasses.replace(forms, **{kind: "bf16"})
    return forms


def _is_bfloat16(checkpoint: Checkpoint, name: str) -> bool:
    """Whether every value of a tensor is one of bfloat16's."""
    blocks = _blocks(checkpoint, name)
    return not any(np.any(block.view(np.uint32) & 0xFFFF) for block in blocks)


def _write_tensors(checkpoint: Checkpoint, writer: PackedWriter, progress: Progress) -> None:
    """Write every tensor in the file's order: matrices, and scales before or behind them."""
    matrices = {matrix.name: matrix for matrix in writer.layout.matrices}
    scaled = {matrix.scale: matrix for matrix in writer.layout.matrices if matrix.scale}
    scales: dict[str, Floats] = {}
    bounds_LD = _lower_bounds(checkpoint)
    for done, name in enumerate(writer.names):
        progress(done, len(writer.names), name)
        matrix = matrices.get(name) or scaled.get(name)
        if matrix is not None and matrix.scale is not None and matrix.scale not in scales:
            scales[matrix.scale] = _scale(checkpoint, matrix)
        if name in scales:
            writer.add(name, scales[name])
        elif matrix is not None:
            scale = scales.get(matrix.scale or "")
            blocks = (_stored(block, matrix, scale) for block in _values(checkpoint, matrix))
            (writer.add_packed if matrix.packed else writer.add)(name, blocks)
        elif name.endswith(".lower_bound"):
            writer.add(name, bounds_LD[int(name.split(".")[1])])
        else:
            writer.add(name, checkpoint.read(name))
    progress(len(writer.names), len(writer.names), "")


def _scale(checkpoint: Checkpoint, matrix: Matrix) -> Floats:
    if matrix.packed:
        scales = [absmean_scale(_blocks(checkpoint, source)) for source in matrix.sources]
        return np.array(scales, dtype=np.float32)
    return np.concatenate([quantise_rows(block)[1] for block in _values(checkpoint, matrix)])


def _stored(block: Floats, matrix: Matrix, scale: Floats | None) -> NDArray[Any]:
    """Rows of a matrix in its form; ternary ones as int8 of -1, 0, 1."""
    if matrix.packed:
        assert scale is not None
        if block.ndim == 2:
            return ternarise(block, scale[0])
        return np.stack([ternarise(block[:, i], scale[i]) for i in range(len(scale))], axis=1)
    if matrix.form == "int8":
        return quantise_rows(block)[0]
    return to_bfloat16(block) if matrix.form == "bf16" else block


def _values(checkpoint: Checkpoint, matrix: Matrix) -> Iterator[Floats]:
    """Blocks of rows of a matrix, float32 [n, K], of trees [n, 2, K]."""
    parts = [_blocks(checkpoint, source) for source in matrix.sources]
    if len(matrix.shape) == 2:
        yield from itertools.chain(*parts)
    else:  # a node's input and output weights side by side
        for pair in zip(*parts, strict=True):
            yield np.stack(pair, axis=1)


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[Floats]:
    """A tensor a few rows at a time: quantising makes several copies of what it is given."""
    for block in checkpoint.read_blocks(name):
        step = max(1, _BLOCK_ELEMENTS // max(1, block[0].size))
        for at in range(0, len(block), step):
            yield block[at : at + step]


def _lower_bounds(checkpoint: Checkpoint) -> Floats:
    """Lower bounds of the forget gates, float32 [L, D]; zeros where the model has none."""
    config = checkpoint.config
    if not architecture_of(config).bounded:
        return np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
    return cumulative_lower_bounds(checkpoint.read("lower_bounds"))
