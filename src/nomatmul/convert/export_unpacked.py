"""Writing a model as a directory that transformers loads: floats whose values are ternary.

A ternary matrix is value * scale in float16, which holds it exactly once the scale is a float16
number. Other tensors are float16 or bfloat16 where that loses nothing, else float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.export_scales import Rounding, fits_half
from nomatmul.convert.exportable import ExportSource, steps
from nomatmul.convert.matrices import Floats
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import new_directory
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.safetensors import bytes_of, header_bytes
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.packed.writer import tokenizer_bundle
from nomatmul.formats.published.gguf_tokenizer import around_texts
from nomatmul.formats.published.llama_write import PublishedTensor, published_config
from nomatmul.formats.quantise import fits_float16, to_bfloat16, to_float16
from nomatmul.formats.tokenizer import JSON_FILE, tokenizer_from_bytes
from nomatmul.formats.tokenizer_config import CONFIG_FILE

EMBEDDINGS = ("auto", "f32", "f16", "bf16")
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[int, int, str], None]


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

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors), tensor.name)
            for block in tensor.blocks():
                yield bytes_of(np.ascontiguousarray(block))
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
        asked = asked if self.name in _OUTER and self._kind != "ternary" else "auto"
        self.dtype = _DTYPES[asked] if asked != "auto" else self._exact()
        self._rounds = asked != "auto" and self.dtype != "F32"

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Blocks of rows as they are stored."""
        for block in self._floats():
            stored: NDArray[Any] = block
            if self.dtype == "F16":
                stored = to_float16(block)
                if not np.isfinite(stored).all():
                    raise ValueError(
                        f"{self.name}: float16 cannot hold {np.abs(block).max():g}, only up to"
                        " 65504 (--embedding bf16 can)"
                    )
            elif self.dtype == "BF16":
                stored = to_bfloat16(block)
            yield stored
        if self._rounds:
            self.rounding.floats[self.name] = f"rounded to {_NAMES[self.dtype]}"

    def _floats(self) -> Iterator[Floats]:
        if self._kind == "float":
            yield from self.source.floats(self.tensor)
            return
        held = self.source.quantised(self.tensor)
        if self._kind == "ternary" and self.dtype == "F16":
            half = self.rounding.half(self.name, held.scale).astype(np.float32)
            held = Quantised(held.kind, held.shape, held.group, half, held.read)
        for rows in steps(held.shape):
            yield held.floats(rows)

    def _exact(self) -> str:
        if self._kind == "ternary":
            scale = self.source.quantised(self.tensor).scale
            if fits_float16(scale) or fits_half(scale):
                return "F16"
            return "F32" if np.any(scale.view(np.uint32) & 0xFFFF) else "BF16"
        half = brain = True
        for block in self._floats():
            half = half and fits_float16(block)
            brain = brain and not np.any(block.view(np.uint32) & 0xFFFF)
            if not half and not brain:
                return "F32"
        return "F16" if half else "BF16"


def _files(values: dict[str, Any], tokenizer: Path | None, text: ModelConfig) -> dict[str, bytes]:
    found = {"config.json": _json(values)}
    ids = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found[GENERATION_FILE] = _json({k: v for k, v in ids.items() if v is not None})
    if tokenizer is None:
        return found
    bundle = tokenizer_bundle(tokenizer, text)
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


def parameters(source: ExportSource) -> int:
    """Weights of all published tensors."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())
