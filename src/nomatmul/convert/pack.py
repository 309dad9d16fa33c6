"""Pack a model: ternarise its linear layers once and write them at two (or 1.6) bits a weight.

The source is read one tensor at a time and a tensor is quantised a block of rows at a time, so the
peak memory is the largest tensor in float32, its packed form, and little else.

Shapes: N output features, K input features, L layers, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomatmul.convert.card import write_card
from nomatmul.convert.check import PackCheck, check_packed
from nomatmul.convert.source import find_checkpoint, prepare_tokenizer
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.names import linear_shapes
from nomatmul.formats.packed import PackedWriter
from nomatmul.formats.packing import PACKINGS, pack_ternary, row_bytes
from nomatmul.formats.quantise import absmean_scale, quantise_rows, ternarise, to_bfloat16

if TYPE_CHECKING:
    from nomatmul.formats.config import ModelConfig

EMBEDDINGS = ("bf16", "int8")
_BLOCK_BYTES = 4 << 20  # float32 bytes of the rows that are quantised at a time


@dataclass(frozen=True)
class PackResult:
    """What `pack` did. Sizes are bytes of files; `tokenizer` is "copied", "converted" or "none"."""

    destination: str
    packing: str
    embedding: str
    parameters: int
    source_bytes: int
    packed_bytes: int
    tokenizer: str
    seconds: float
    check: PackCheck | None


def pack(
    src: str | Path,
    dst: str | Path,
    *,
    packing: str = "2bit",
    embedding: str = "bf16",
    check: bool = True,
    check_text: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> PackResult:
    """Write the packed form of the model in `src` to the new directory `dst`.

    src: a training checkpoint, the directory of a training run (its latest model is taken), or a
    published model. packing: "2bit" or "1.6bit". embedding: "bf16" or "int8" (one scale a row).
    check: compare packed and source logits on `check_text` (a file; None: a built-in paragraph).
    progress: called with (done, total, tensor name).
    Raises ValueError when `src` is damaged, already packed, dense, or holds weights that are not
    finite; when `dst` exists; OSError when the disk is full. Nothing is left under `dst` then.
    """
    _check_choice("packing", packing, PACKINGS)
    _check_choice("embedding", embedding, EMBEDDINGS)
    start = time.perf_counter()
    source_dir, target = find_checkpoint(Path(src)), Path(dst)
    checkpoint = open_checkpoint(source_dir)
    _refuse_unsuitable(checkpoint, src)
    with prepare_tokenizer(source_dir, checkpoint.config) as (tokenizer_path, tokenizer_kind):
        with PackedWriter(target, checkpoint.config, packing, embedding, tokenizer_path) as writer:
            _write_tensors(checkpoint, writer, packing, embedding, progress)
            write_card(writer.directory, checkpoint.config, packing, embedding)
    seconds = time.perf_counter() - start
    return PackResult(
        destination=str(target),
        packing=packing,
        embedding=embedding,
        parameters=checkpoint.config.param_count(),
        source_bytes=_directory_bytes(source_dir),
        packed_bytes=_directory_bytes(target),
        tokenizer=tokenizer_kind,
        seconds=seconds,
        check=check_packed(source_dir, target, check_text) if check else None,
    )


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} {value!r} is unknown; legal values are {', '.join(legal)}")


def _refuse_unsuitable(checkpoint: Checkpoint, src: str | Path) -> None:
    if checkpoint.kind == "packed":
        raise ValueError(
            f"{src} is packed already; packing it again would quantise ternary weights twice"
        )
    if checkpoint.config.linear != "ternary":
        raise ValueError(f"{src} is a dense model: there is nothing ternary to pack")


def _write_tensors(
    checkpoint: Checkpoint,
    writer: PackedWriter,
    packing: str,
    embedding: str,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    maker = _TensorMaker(checkpoint, packing, embedding)
    names = list(writer.names())
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        writer.add(name, maker.make(name))
    if progress is not None:
        progress(len(names), len(names), "")


class _TensorMaker:
    """Makes the tensors of a packed directory by name, in any order that keeps X.packed, X.scale
    and embedding.weight, embedding.scale together (one source tensor is held at a time)."""

    def __init__(self, checkpoint: Checkpoint, packing: str, embedding: str) -> None:
        self.checkpoint = checkpoint
        self.packing = packing
        self.embedding = embedding
        self.linears = linear_shapes(checkpoint.config)
        self.lower_bounds: np.ndarray | None = None
        self.scales: dict[str, np.ndarray] = {}

    def make(self, name: str) -> np.ndarray:
        """The array of one packed tensor."""
        layer, _, kind = name.rpartition(".")
        if name in self.scales:
            return self.scales.pop(name)
        if kind in ("packed", "scale") and layer in self.linears:
            packed, scale = self._pack_linear(layer)
            self.scales[f"{layer}.scale"] = scale
            return packed
        if name == "embedding.weight":
            return self._embedding()
        if kind == "lower_bound":
            return self._lower_bound(int(name.split(".")[1]))
        return self._read(name)

    def _read(self, name: str) -> np.ndarray:
        array = self.checkpoint.read(name)
        for rows in _row_blocks(array):
            if not np.isfinite(rows).all():
                raise ValueError(f"{name} holds a value that is not finite (NaN or infinity)")
        return array

    def _pack_linear(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 [N, row_bytes] and scale float32 [1] of one linear layer."""
        tied = layer == "head" and self.checkpoint.config.tie_embeddings
        weight_NK = self._read("embedding.weight" if tied else f"{layer}.weight")
        scale = absmean_scale(_row_blocks(weight_NK))
        rows, columns = weight_NK.shape
        packed = np.empty((rows, row_bytes(columns, self.packing)), dtype=np.uint8)
        at = 0
        for block in _row_blocks(weight_NK):
            end = at + len(block)
            packed[at:end] = pack_ternary(ternarise(block, scale), self.packing)
            at = end
        return packed, np.array([scale], dtype=np.float32)

    def _embedding(self) -> np.ndarray:
        table_VD = self._read("embedding.weight")
        out = np.empty(table_VD.shape, np.uint16 if self.embedding == "bf16" else np.int8)
        scale_V = np.empty(len(table_VD), dtype=np.float32)
        at = 0
        for block in _row_blocks(table_VD):
            end = at + len(block)
            if self.embedding == "bf16":
                out[at:end] = to_bfloat16(block)
            else:
                out[at:end], scale_V[at:end] = quantise_rows(block)
            at = end
        if self.embedding == "int8":
            self.scales["embedding.scale"] = scale_V
        return out

    def _lower_bound(self, layer: int) -> np.ndarray:
        if self.lower_bounds is None:
            self.lower_bounds = _cumulated(self.checkpoint.config, self._read)
        return self.lower_bounds[layer]


def _row_blocks(array: np.ndarray) -> Any:
    """The array's rows a few at a time, so that temporaries stay small."""
    step = max(1, _BLOCK_BYTES // max(1, array[0].size * 4))
    return (array[at : at + step] for at in range(0, len(array), step))


def _cumulated(config: ModelConfig, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Lower bounds of the forget gates, float32 [L, D]; zeros where the model has none."""
    if not config.use_lower_bound:
        return np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
    table_LD = read("lower_bounds").astype(np.float32)
    weights_LD = np.exp(table_LD - table_LD.max(axis=0))
    weights_LD /= weights_LD.sum(axis=0)
    return np.cumsum(weights_LD, axis=0, dtype=np.float32) - weights_LD[0]


def _directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
