"""Writing a model as a directory that transformers loads: floats whose values are ternary.

A ternary matrix is value * scale in float16, which holds it exactly once the scale is a float16
number. Other tensors are float16 or bfloat16 where that loses nothing, else float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nomatmul.convert.export_rounding import Rounding, exact_type, fits_half, stored_floats
from nomatmul.convert.exportable import ExportSource, steps
from nomatmul.convert.matrices import Floats
from nomatmul.convert.progress import Progress
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import new_directory
from nomatmul.formats.files.gguf_blocks import Bytes
from nomatmul.formats.files.safetensors import header_bytes
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.packed.writer import tokenizer_bundle
from nomatmul.formats.published.gguf_tokenizer import around_texts
from nomatmul.formats.published.llama_write import PublishedTensor, published_config
from nomatmul.formats.tokenizer import JSON_FILE, tokenizer_from_bytes
from nomatmul.formats.tokenizer_config import CONFIG_FILE

EMBEDDINGS = ("auto", "f32", "f16", "bf16")
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_unpacked(
    source: ExportSource,
    out: Path,
    *,
    embedding: str,
    tokenizer: Path | None,
    text: ModelConfig,
    progress: Progress,
) -> Rounding:
    """Write the directory. tokenizer: path of tokenizer.json; text: the config whose start token
    texts get.

    Raises ValueError for a value that the dtype asked for cannot hold.
    """
    rounding = Rounding()
    tensors = [_Tensor(source, tensor, embedding, rounding) for tensor in source.tensors.values()]
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = _NAMES[dtypes.pop()] if len(dtypes) == 1 else "float32"
    files = _files(published_config(source.config, dtype), tokenizer, text)
    header = header_bytes({t.name: (t.dtype, t.shape) for t in tensors}, {"format": "pt"})

    def content() -> Iterator[bytes | Bytes]:
        yield header
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors), tensor.name)
            yield from tensor.blocks()
        progress(len(tensors), len(tensors), "")

    with new_directory(out) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        write_file(directory / "model.safetensors", content(), sync=False)
    return rounding


class _Tensor:
    """A published tensor in the dtype that it is stored in."""

    def __init__(
        self, source: ExportSource, tensor: PublishedTensor, asked: str, rounding: Rounding
    ) -> None:
        self.source, self.tensor, self.rounding = source, tensor, rounding
        self.name, self.shape = tensor.name, tensor.shape
        self._kind = source.kind(tensor)
        if self._kind == "ternary":
            self.dtype = _ternary_dtype(source.quantised(tensor).scale)
        elif self.name in _OUTER and asked != "auto":
            self.dtype = asked.upper()
        else:
            self.dtype = exact_type(self._floats())

    def blocks(self) -> Iterator[Bytes]:
        """Blocks of rows as they are stored."""
        return stored_floats(self.name, self.dtype, self._floats(), self.rounding)

    def _floats(self) -> Iterator[Floats]:
        if self._kind == "float":
            yield from self.source.floats(self.tensor)
            return
        held = self.source.quantised(self.tensor)
        if self._kind == "ternary" and self.dtype == "F16":
            scale = self.rounding.half(self.name, held.scale).astype(np.float32)
            held = dataclasses.replace(held, scale=scale)
        yield from (held.floats(rows) for rows in steps(held.shape))


def _ternary_dtype(scale: Floats) -> str:
    """float16 where it loses no more of the scales than its 11 bits allow, else what is exact."""
    if fits_half(scale):
        return "F16"
    return exact_type([scale])


def _files(values: dict[str, Any], tokenizer: Path | None, text: ModelConfig) -> dict[str, bytes]:
    found = {"config.json": _json(values)}
    ids = {k: v for k in _TOKENS if (v := values[k]) is not None}
    bundle = {} if tokenizer is None else tokenizer_bundle(tokenizer, text)
    # transformers ends a text at the tokens that this file names, whatever config.json says
    sampling = json.loads(bundle.pop(GENERATION_FILE, b"{}"))
    found[GENERATION_FILE] = _json({**sampling, **ids})
    if tokenizer is None:
        return found
    bundle[JSON_FILE] = _with_start(bundle[JSON_FILE], text.bos_token_id, tokenizer)
    names = json.loads(bundle[CONFIG_FILE])
    names["add_bos_token"] = text.bos_token_id is not None
    return {**found, **bundle, CONFIG_FILE: _json(names)}


def _with_start(data: bytes, start: int | None, path: Path) -> bytes:
    """A tokenizer.json that puts the start token before a text, as this package does by itself."""
    tokenizer = tokenizer_from_bytes(data, path)
    if start is None or tokenizer.encode("a").ids[:1] == [start]:
        return data
    document = json.loads(data)
    if document.get("post_processor") and document["post_processor"]["type"] != "ByteLevel":
        raise ValueError(
            f"{path} puts tokens around a text by {document['post_processor']['type']!r}, but the"
            f" start token {start} of the model is not among them"
        )
    name = tokenizer.id_to_token(start)
    if name is None:
        raise ValueError(f"{path} has no token {start}, the start token of the model")
    document["post_processor"] = around_texts([start], [], {start: name})
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
