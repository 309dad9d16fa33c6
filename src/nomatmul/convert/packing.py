"""Pack a model: ternarise its linear layers once and write them at two (or 1.6) bits a weight.

The source is read and quantised a block of rows at a time, so the peak memory is a few blocks,
whatever the size of the model (a pickled `pytorch_model.bin` is mapped by torch instead).

Shapes: L layers, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nomatmul.convert.card import card_text
from nomatmul.convert.check import CheckText, PackCheck, check_packed
from nomatmul.convert.encoder import EncoderCheck, check_encoder_packed, pack_encoder
from nomatmul.convert.source import find_checkpoint, prepare_tokenizer
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed import EMBEDDING_FORMS, PackedWriter
from nomatmul.formats.packed.encoder import FORMS, Forms, is_packed_encoder
from nomatmul.formats.packing import PACKINGS
from nomatmul.formats.quantise import absmean_scale, quantise_rows, ternarise, to_bfloat16

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
    progress: Callable[[int, int, str], None] | None = None,
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
    _check_choice("embedding", embedding, (*EMBEDDING_FORMS, "auto"))
    _check_choice("rows", rows, (*FORMS, "auto"))
    _check_choice("dense", dense, (*FORMS, "auto"))
    start = time.perf_counter()
    # A wrong file name should be told before the work, not after it.
    text = CheckText.read(check_text) if check else None
    source_dir, target = find_checkpoint(Path(src)), Path(dst)
    if is_packed_encoder(source_dir):
        raise ValueError(f"{src} is packed already; give the checkpoint that it was made of")
    checkpoint = open_checkpoint(source_dir)
    _refuse_unsuitable(checkpoint, src)
    if checkpoint.reading is not None:
        forms = _encoder_forms(checkpoint, rows, dense, embedding)
        kind = pack_encoder(checkpoint, target, forms, progress or _silent)
        return PackResult(
            destination=str(target),
            packing="none",
            embedding=forms.embedding,
            parameters=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
            source_bytes=_directory_bytes(source_dir),
            packed_bytes=_directory_bytes(target),
            tokenizer=kind,
            seconds=time.perf_counter() - start,
            check=check_encoder_packed(checkpoint, target, text) if text is not None else None,
            rows=forms.rows if checkpoint.config.channel_mixer == "fff" else None,
            dense=forms.dense,
            ignored_keys=checkpoint.ignored,
        )
    for name, value in (("rows", rows), ("dense", dense)):
        if value != "auto":
            raise ValueError(f"{name} {value!r} is for encoders; {src} is a ternary language model")
    if embedding == "auto":
        embedding = "bf16" if _is_bfloat16(checkpoint) else "f32"
    config = checkpoint.config
    with prepare_tokenizer(source_dir, config) as (tokenizer_path, tokenizer_kind):
        card = card_text(config, packing, embedding)
        with PackedWriter(target, config, packing, embedding, tokenizer_path, card) as writer:
            _write_tensors(checkpoint, writer, progress or _silent)
    seconds = time.perf_counter() - start
    return PackResult(
        destination=str(target),
        packing=packing,
        embedding=embedding,
        parameters=config.param_count(),
        source_bytes=_directory_bytes(source_dir),
        packed_bytes=_directory_bytes(target),
        tokenizer=tokenizer_kind,
        seconds=seconds,
        check=check_packed(source_dir, target, text) if text is not None else None,
        ignored_keys=checkpoint.ignored,
    )


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} {value!r} is unknown; legal values are {', '.join(legal)}")


def _refuse_unsuitable(checkpoint: Checkpoint, src: str | Path) -> None:
    if checkpoint.kind == "packed":
        raise ValueError(
            f"{src} is packed already; packing it again would quantise ternary weights twice"
        )
    if checkpoint.reading is None and checkpoint.config.linear != "ternary":
        raise ValueError(f"{src} is a dense model: there is nothing ternary to pack")


def _silent(done: int, total: int, name: str) -> None:
    """Progress that nobody watches."""


def _write_tensors(
    checkpoint: Checkpoint, writer: PackedWriter, progress: Callable[[int, int, str], None]
) -> None:
    """Write every tensor in the file's order; a linear layer's codes come before its scale."""
    scales: dict[str, list[np.float32]] = {}
    bounds_LD = _lower_bounds(checkpoint)
    for done, name in enumerate(writer.names):
        progress(done, len(writer.names), name)
        layer, _, kind = name.rpartition(".")
        if kind == "packed" and layer.endswith(".rows"):
            sources = [layer.removesuffix("rows") + part for part in ("w_in", "w_out")]
            scales[layer] = [absmean_scale(_blocks(checkpoint, source)) for source in sources]
            writer.add_packed(name, _fff_blocks(checkpoint, sources, scales[layer]))
        elif kind == "packed":
            scale = absmean_scale(_blocks(checkpoint, f"{layer}.weight"))
            scales[layer] = [scale]
            blocks = _blocks(checkpoint, f"{layer}.weight")
            writer.add_packed(name, (ternarise(block, scale) for block in blocks))
        elif name == "embedding.scale":
            blocks = _blocks(checkpoint, "embedding.weight")
            writer.add(name, (quantise_rows(block)[1] for block in blocks))
        elif name == "embedding.weight":
            to_form = EMBEDDING_TO[writer.embedding_form]
            writer.add(name, (to_form(block) for block in _blocks(checkpoint, name)))
        elif kind == "scale":
            writer.add(name, np.array(scales[layer], dtype=np.float32))
        elif kind == "lower_bound":
            writer.add(name, bounds_LD[int(name.split(".")[1])])
        else:
            writer.add(name, checkpoint.read(name))
    progress(len(writer.names), len(writer.names), "")


# From a block of rows, float32, to what the file holds.
EMBEDDING_TO: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f32": lambda block: block,
    "bf16": to_bfloat16,
    "int8": lambda block: quantise_rows(block)[0],
}


def _encoder_forms(checkpoint: Checkpoint, rows: str, dense: str, embedding: str) -> Forms:
    """ "auto" is what loses nothing: bf16 where every value is one of bfloat16's, else f32."""
    names = checkpoint.names()
    parts = {
        "rows": (rows, [name for name in names if name.endswith((".w_in", ".w_out"))]),
        "dense": (dense, [name for name in names if name.endswith("_proj.weight")]),
        "embedding": (embedding, ["embedding.weight"]),
    }
    return Forms(
        **{
            part: form
            if form != "auto"
            else "bf16"
            if all(_is_bfloat16(checkpoint, name) for name in stored)
            else "f32"
            for part, (form, stored) in parts.items()
        }
    )


def _is_bfloat16(checkpoint: Checkpoint, name: str = "embedding.weight") -> bool:
    """Whether every value of a tensor is one of bfloat16's."""
    blocks = _blocks(checkpoint, name)
    return not any(np.any(block.view(np.uint32) & 0xFFFF) for block in blocks)


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """A matrix a few rows at a time: quantising makes several copies of what it is given."""
    for block in checkpoint.read_blocks(name):
        step = max(1, _BLOCK_ELEMENTS // max(1, block[0].size))
        for at in range(0, len(block), step):
            yield block[at : at + step]


def _fff_blocks(
    checkpoint: Checkpoint, sources: list[str], scales: list[np.float32]
) -> Iterator[np.ndarray]:
    """Rows of an FFF, ternary int8 [n, 2, D]: a node's input and output weights side by side."""
    for parts in zip(*(_blocks(checkpoint, source) for source in sources), strict=True):
        pairs = zip(parts, scales, strict=True)
        yield np.stack([ternarise(part, scale) for part, scale in pairs], axis=1)


def _lower_bounds(checkpoint: Checkpoint) -> np.ndarray:
    """Lower bounds of the forget gates, float32 [L, D]; zeros where the model has none."""
    config = checkpoint.config
    if not architecture_of(config).bounded:
        return np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
    return cumulative_lower_bounds(checkpoint.read("lower_bounds"))


def _directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
