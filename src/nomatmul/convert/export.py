"""Export a ternary decoder to the files of other engines: `export`.

GGUF for llama.cpp and its kin, or floats with ternary values for transformers. The source is read
a block of rows at a time, so memory stays at a few blocks, whatever the size of the model (of a
packed directory: at one matrix).
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from nomatmul.convert.export_gguf import ACTIVATIONS, export_gguf, ternary_type
from nomatmul.convert.export_gguf import EMBEDDINGS as GGUF_EMBEDDINGS
from nomatmul.convert.export_gguf import TYPES as GGUF_TYPES
from nomatmul.convert.export_rounding import Rounding
from nomatmul.convert.export_tokenizer import vocabulary_metadata
from nomatmul.convert.export_unpacked import EMBEDDINGS as UNPACKED_EMBEDDINGS
from nomatmul.convert.export_unpacked import export_unpacked
from nomatmul.convert.exportable import ExportSource
from nomatmul.convert.packing import pack
from nomatmul.convert.progress import Progress, silent
from nomatmul.convert.source import find_checkpoint, source_tokenizer, text_config
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import check_writable
from nomatmul.formats.files.directory import model_bytes
from nomatmul.formats.packed.writer import refuse_existing
from nomatmul.formats.runs import GGUF_SUFFIX

TARGETS = ("gguf", "unpacked", "packed")


@dataclass(frozen=True)
class ExportResult:
    """What `export` did. Sizes are bytes of files.

    type: of ternary matrices in a GGUF file, "" elsewhere and of dense models. family: "llama" or
    "qwen3", "" of a packed directory. scale_change: the largest relative change of a scale by
    rounding to float16. notes: what was rounded, a line each. tokenizer: as `PackResult` has it.
    """

    destination: str
    to: str
    type: str
    family: str
    parameters: int
    source_bytes: int
    exported_bytes: int
    tokenizer: str
    seconds: float
    scale_change: float = 0.0
    notes: list[str] = field(default_factory=list)


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "auto",
    type: str = "auto",
    embedding: str = "auto",
    progress: Progress | None = None,
) -> ExportResult:
    """Write `model` to `out`, which must not exist.

    model: a packed directory, a training run or its checkpoint, a published model, a GGUF file, or
    hf:owner/name. to: "gguf" (a file), "unpacked" (a directory for transformers), "packed" (what
    `pack` writes) or "auto": gguf where `out` ends in .gguf, else unpacked. type: of ternary
    matrices in a GGUF file, "tq2_0", "pq2_0" or "q2_0"; "auto" is TQ2_0 for one scale a tensor or a
    group of 256, PQ2_0 for groups of 128, Q2_0 for groups of 64. embedding: how embedding and a
    head that is not ternary are kept: "f32", "f16", "bf16", in a GGUF file "q8_0"; "auto" is what
    the source has exactly, but in a GGUF file 16 bits at most.
    Raises ValueError for a model that has no such form, naming the part, and for words that are
    unknown; OSError when the disk is full. Nothing is left under `out` then.
    """
    start, target = time.perf_counter(), Path(out)
    to = _target(to, target)
    _check_words(to, type, embedding)
    report = progress or silent
    if to == "packed":
        return _pack(model, target, embedding, progress)
    _check_place(to, target)
    path = find_checkpoint(Path(model))
    source = ExportSource(path)
    kind = ternary_type(source, type) if to == "gguf" else ""
    with source_tokenizer(source.checkpoint, path) as (tokenizer, how):
        text = text_config(source.checkpoint, tokenizer, how)
        if to == "gguf":
            rounding = _gguf(source, target, kind, embedding, tokenizer, text, report)
        else:
            rounding = _unpacked(source, target, embedding, tokenizer, text, report)
    return _result(source, target, to, kind, how, start, rounding)


def _gguf(
    source: ExportSource,
    target: Path,
    kind: str,
    embedding: str,
    tokenizer: Path | None,
    text: ModelConfig,
    progress: Progress,
) -> Rounding:
    words = vocabulary_metadata(tokenizer, source.config, text.bos_token_id, source.path)
    _warn_of_activations(source, f"llama.cpp computes with {ACTIVATIONS.get(kind, '')}")
    return export_gguf(
        source, target, kind=kind, embedding=embedding, vocabulary=words, progress=progress
    )


def _unpacked(
    source: ExportSource,
    target: Path,
    embedding: str,
    tokenizer: Path | None,
    text: ModelConfig,
    progress: Progress,
) -> Rounding:
    _warn_of_activations(source, "transformers computes with floats")
    return export_unpacked(
        source, target, embedding=embedding, tokenizer=tokenizer, text=text, progress=progress
    )


def _result(
    source: ExportSource,
    target: Path,
    to: str,
    kind: str,
    tokenizer: str,
    start: float,
    rounding: Rounding,
) -> ExportResult:
    return ExportResult(
        destination=str(target),
        to=to,
        type=kind,
        family=source.family,
        parameters=source.parameters,
        source_bytes=model_bytes(source.path),
        exported_bytes=model_bytes(target),
        tokenizer=tokenizer,
        seconds=time.perf_counter() - start,
        scale_change=rounding.scale_change,
        notes=rounding.notes(),
    )


def _target(to: str, out: Path) -> str:
    if to == "auto":
        return "gguf" if out.suffix == GGUF_SUFFIX else "unpacked"
    if to not in TARGETS:
        raise ValueError(f"to {to!r} is unknown; legal values are auto, {', '.join(TARGETS)}")
    if to == "gguf" and out.suffix != GGUF_SUFFIX:
        raise ValueError(f"{out} must end in {GGUF_SUFFIX}, by which programs know such a file")
    return to


def _check_words(to: str, type: str, embedding: str) -> None:
    if type not in GGUF_TYPES:
        raise ValueError(f"type {type!r} is unknown; legal values are {', '.join(GGUF_TYPES)}")
    if type != "auto" and to != "gguf":
        raise ValueError(f"type {type!r} is of GGUF files, not of --to {to}")
    legal = GGUF_EMBEDDINGS if to == "gguf" else UNPACKED_EMBEDDINGS
    if embedding not in legal:
        raise ValueError(
            f"embedding {embedding!r} does not go with --to {to}; legal values are"
            f" {', '.join(legal)}"
        )


def _check_place(to: str, out: Path) -> None:
    """Refuse a place where nothing can be written, before the work for it."""
    refuse_existing(out)
    if to == "gguf":
        check_writable(out)


def _warn_of_activations(source: ExportSource, words: str) -> None:
    if source.int8_activations:
        warnings.warn(
            f"{source.path} computes with int8 activations a token; {words}: on small models the"
            " likeliest token was another at up to 3 positions in 100, from where on a text that is"
            " written without sampling is another (docs/exporting.md)",
            stacklevel=4,
        )


def _pack(
    model: str | Path, target: Path, embedding: str, progress: Progress | None
) -> ExportResult:
    found = pack(model, target, embedding=embedding, check=False, progress=progress)
    return ExportResult(
        destination=found.destination,
        to="packed",
        type="",
        family="",
        parameters=found.parameters,
        source_bytes=found.source_bytes,
        exported_bytes=found.packed_bytes,
        tokenizer=found.tokenizer,
        seconds=found.seconds,
    )
