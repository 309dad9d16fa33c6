"""Pack a model: each of its matrices in its form, ternary ones quantised once.

The source is read and quantised a block of rows at a time, so the peak memory is a few blocks,
whatever the size of the model (a pickled `pytorch_model.bin` is mapped by torch instead).

Legend: L layers, D hidden size, N/K rows and columns of a matrix.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.check import EncoderCheck, PackCheck, SourceRun, check_packed, run_source
from nomatmul.convert.check_text import CheckText
from nomatmul.convert.forms import checked_forms, choose_forms, rounds_head, with_short_head
from nomatmul.convert.head import HeadCost
from nomatmul.convert.matrices import Floats, MatrixSource
from nomatmul.convert.progress import Progress, silent
from nomatmul.convert.source import find_checkpoint, source_tokenizer, text_config
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.files.directory import directory_bytes, model_bytes
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.files.safetensors import NUMPY_DTYPES
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed import Forms, PackedWriter
from nomatmul.formats.packed.layout import CONFIG_FILE, Layout
from nomatmul.formats.packed.writer import refuse_existing


@dataclass(frozen=True)
class PackResult:
    """What `pack` did. Sizes are bytes of files; `tokenizer` is "copied", "converted",
    "gguf" (the file's own) or "none".

    Of an encoder `packing` is "none", and rows and dense say how those are kept; `head` of a model
    whose head has a form of its own. `head_choice` says how that of a published ternary transformer
    was chosen: "asked"; "measured", by what int8 rows cost (`head_int8`); "not measured", where
    nothing was to be checked or could be; None where there is no choice. Of a published transformer
    `weights` and `scales` say what was found, scale_group how many inputs share a scale. parts:
    {kind of matrices: bytes}.
    `ignored_keys` are those of a published config.json that nobody here knows.
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
    head: str | None = None
    head_choice: str | None = None
    head_int8: HeadCost | None = None
    weights: str | None = None
    scales: dict[str, int] = field(default_factory=dict)
    scale_group: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()


def pack(
    src: str | Path,
    dst: str | Path,
    *,
    packing: str = "2bit",
    embedding: str = "auto",
    head: str = "auto",
    rows: str = "auto",
    dense: str = "auto",
    check: bool = True,
    check_text: str | Path | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Write the packed form of the model in `src` to the new directory `dst`.

    src: a training checkpoint, the directory of a training run (its latest model is taken), a
    published model, or a GGUF file. packing: "2bit" or "1.6bit". embedding: "f32", "bf16", "int8"
    (one scale a row), or "auto": bf16 where that loses nothing, else f32. Rounding an embedding of
    32 bits moves logits by some percent, because the int8 activations behind it round differently.
    Of published ternary transformers "f16" is legal too, and "auto" is bf16 or f16 where those lose
    nothing, else int8, and int8 for 32 inputs where the source holds that. head: as embedding, of a
    head that is not ternary; "auto" is int8 there, beside an embedding that loses nothing, tied or
    not, but one that is not tied keeps 16 bits where `check` finds int8 too costly (head.py). The
    embedding loses nothing where the head is to stay a float. "float16", "bfloat16",
    "float32" are f16, bf16, f32.
    rows, dense: of an encoder, how the rows of its FFFs and its dense matrices are kept: "f32",
    "bf16" or "int8" (one scale a row); "auto" is f32 or, where that loses nothing, bf16. `packing`
    does not concern encoders. dense is also for dense published transformers.
    check: compare packed and source logits on `check_text` (a file; None: a built-in paragraph).
    progress: called with (done, total, tensor name).
    Raises ValueError when `src` is damaged, already packed, dense (of our own), or holds weights
    that are not finite; when `dst` exists; OSError when the disk is full. Nothing is left under
    `dst` then.
    """
    asked = checked_forms(packing, embedding=embedding, head=head, rows=rows, dense=dense)
    start = time.perf_counter()
    # A wrong file name is reported before the work, not after it.
    text = CheckText.read(check_text) if check else None
    target, (source, checkpoint) = Path(dst), _open_source(src, asked)
    reading = checkpoint.reading
    forms = choose_forms(checkpoint, packing, asked)
    run, open_head = None, rounds_head(checkpoint, forms, asked)
    with source_tokenizer(checkpoint, source) as (tokenizer_path, tokenizer_kind):
        target_config = text_config(checkpoint, tokenizer_path, tokenizer_kind)
        if open_head and text is not None:
            refuse_existing(target)
            began = time.perf_counter()
            run = run_source(checkpoint, target_config, tokenizer_path, text)
            start += time.perf_counter() - began  # it is the check's first half
            if run and run.head and not run.head.bearable:  # only that matrix differs
                forms = with_short_head(checkpoint, forms)
        with PackedWriter(target, target_config, forms, reading, tokenizer_path) as writer:
            _write_tensors(checkpoint, writer, progress or silent)
            parts = _parts(writer.layout)
    found = checkpoint.found
    return PackResult(
        destination=str(target),
        packing=forms.ternary,
        embedding=forms.embedding,
        parameters=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
        source_bytes=model_bytes(source),
        packed_bytes=directory_bytes(target),
        tokenizer=tokenizer_kind,
        seconds=time.perf_counter() - start,
        check=None if text is None else _checked(checkpoint, target, text, run),
        rows=None if reading is None or forms.rows == "none" else forms.rows,
        dense=None if forms.dense == "none" else forms.dense,
        head=None if forms.head == "none" else forms.head,
        head_choice=_head_choice(open_head, run, forms, asked),
        head_int8=run.head if run else None,
        weights=None if found is None else found.words,
        scales={} if found is None else found.scales,
        scale_group=checkpoint.config.scale_group,
        parts=parts,
        ignored_keys=checkpoint.ignored,
    )


def _open_source(src: str | Path, asked: dict[str, str]) -> tuple[Path, Checkpoint]:
    """Where the checkpoint is, and what it is; ValueError for what cannot be packed as asked."""
    source = find_checkpoint(Path(src))
    if source.is_dir() and "format" in read_json_object(source / CONFIG_FILE):
        raise ValueError(f"{src} is packed already; give the checkpoint that it was made of")
    checkpoint = open_checkpoint(source)
    if checkpoint.reading is None:
        _refuse_unsuitable(checkpoint, src, asked)
    return source, checkpoint


def _head_choice(
    open_head: bool, run: SourceRun | None, forms: Forms, asked: dict[str, str]
) -> str | None:
    if open_head:
        return "measured" if run and run.head else "not measured"
    return "asked" if asked["head"] != "auto" and forms.head != "none" else None


def _checked(
    checkpoint: Checkpoint, target: Path, text: CheckText, run: SourceRun | None
) -> PackCheck | EncoderCheck | None:
    """What the check finds; a model that cannot be computed is not left behind."""
    try:
        return check_packed(checkpoint, target, text, run)
    except Exception:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _refuse_unsuitable(checkpoint: Checkpoint, src: str | Path, asked: dict[str, str]) -> None:
    dense = checkpoint.config.linear != "ternary"
    if dense and checkpoint.found is None:
        raise ValueError(f"{src} is a dense model: there is nothing ternary to pack")
    for name in ("rows",) if dense else ("rows", "dense"):
        if asked[name] != "auto":
            kind = "dense" if dense else "ternary"
            more = " and dense transformers" if name == "dense" else ""
            raise ValueError(
                f"{name} {asked[name]!r} is for encoders{more}; {src} is a {kind} language model"
            )


def _parts(layout: Layout) -> dict[str, int]:
    """{kind of matrices: their bytes in the file}, scales and everything else apart."""
    tensors = {name: _nbytes(*stored) for name, stored in layout.tensors().items()}
    found: dict[str, int] = {}
    for matrix in layout.matrices:
        found[matrix.kind] = found.get(matrix.kind, 0) + tensors.pop(matrix.name)
        if matrix.scale is not None:
            found["scales"] = found.get("scales", 0) + tensors.pop(matrix.scale)
    return {**found, "other": sum(tensors.values())}


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


def _write_tensors(checkpoint: Checkpoint, writer: PackedWriter, progress: Progress) -> None:
    """Write every tensor in the file's order: matrices, and scales before or behind them."""
    matrices = {matrix.name: matrix for matrix in writer.layout.matrices}
    scaled = {matrix.scale: matrix for matrix in writer.layout.matrices if matrix.scale}
    sources: dict[str, MatrixSource] = {}
    scales: dict[str, NDArray[Any]] = {}  # of matrices that lie before their scales
    bounds_LD = _lower_bounds(checkpoint)
    for done, name in enumerate(writer.names):
        progress(done, len(writer.names), name)
        if name in scales:
            writer.add(name, scales.pop(name))
        elif name in scaled:
            matrix = scaled[name]
            sources[matrix.name] = MatrixSource(checkpoint, matrix)
            writer.add(name, sources[matrix.name].scale())
        elif name in matrices:
            matrix = matrices[name]
            behind = matrix.scale is not None and name not in sources
            source = sources.pop(name, None) or MatrixSource(checkpoint, matrix)
            (writer.add_packed if matrix.packed else writer.add)(name, source.rows())
            if behind:
                scales[str(matrix.scale)] = source.scale()
        elif name.endswith(".lower_bound"):
            writer.add(name, bounds_LD[int(name.split(".")[1])])
        else:
            writer.add(name, checkpoint.read(name))
    progress(len(writer.names), len(writer.names), "")


def _lower_bounds(checkpoint: Checkpoint) -> Floats:
    """Lower bounds of the forget gates, float32 [L, D]; zeros where the model has none."""
    config = checkpoint.config
    if not architecture_of(config).bounded:
        return np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
    return cumulative_lower_bounds(checkpoint.read("lower_bounds"))
