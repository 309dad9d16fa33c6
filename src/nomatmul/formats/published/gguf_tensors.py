"""Tensors of a GGUF model under Hugging Face's names, in Hugging Face's order of rows.

llama.cpp rotates neighbouring elements of a head in models of architecture `llama`, so that its
converter permutes the rows of q and k: row 2 i + j of a head of E is Hugging Face's i + j E / 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.files.gguf_parts import GgufParts
from nomatmul.formats.files.gguf_types import BlockType
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.source import TensorSource

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Stored name -> Hugging Face's, and the sizes: V vocabulary, D hidden size, M intermediate size,
# H heads and K key-value heads times E head size.
_Names = dict[str, tuple[str, str]]
_OUTER: _Names = {
    EMBEDDING: ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
    HEAD: ("lm_head.weight", "VD"),
}
_BLOCK: _Names = {
    "attn_norm": ("input_layernorm", "D"),
    "attn_q": ("self_attn.q_proj", "HD"),
    "attn_k": ("self_attn.k_proj", "KD"),
    "attn_v": ("self_attn.v_proj", "KD"),
    "attn_output": ("self_attn.o_proj", "DH"),
    "ffn_norm": ("post_attention_layernorm", "D"),
    "ffn_gate": ("mlp.gate_proj", "MD"),
    "ffn_up": ("mlp.up_proj", "MD"),
    "ffn_down": ("mlp.down_proj", "DM"),
}
_MORE: dict[str, _Names] = {
    "llama": {},
    "qwen3": {
        "attn_q_norm": ("self_attn.q_norm", "E"),
        "attn_k_norm": ("self_attn.k_norm", "E"),
    },
    "bitnet": {
        "attn_sub_norm": ("self_attn.attn_sub_norm", "H"),
        "ffn_sub_norm": ("mlp.ffn_sub_norm", "M"),
    },
}
# BitNet-embedding has a norm inside each linear; as bitnet.cpp's converter names it.
_INNER: _Names = {
    f"{part}_norm_in": (f"{name}.norm", sizes[1])
    for part, (name, sizes) in _BLOCK.items()
    if len(sizes) == 2
}


def has_inner_norms(file: GgufFile | GgufParts) -> bool:
    """Whether the first block has any norm inside a linear."""
    return any(f"blk.0.{part}.weight" in file.tensors for part in _INNER)


class GgufSource(TensorSource):
    """The tensors that a model's config asks for; the file has these and no others.

    permuted: are the rows of q and k in llama.cpp's order? one_scale: ternary matrices of which
    every group has the same scale are given with one. A factor that lies beside a matrix of a block
    (blk.0.attn_q.scale) is part of its values. Raises FormatError naming a tensor that is missing,
    not known, or of another shape.
    """

    nested = False

    def __init__(
        self, file: GgufFile | GgufParts, values: JsonObject, *, permuted: bool, one_scale: bool
    ) -> None:
        self.file = file
        self.left_out: dict[str, str] = {}
        self._one_scale = one_scale
        self._head_dim = values["head_dim"] if permuted else 0
        self._stored: dict[str, str] = {}
        head, inner = HEAD in file.tensors, has_inner_norms(file)
        for stored, name, shape in stored_tensors(values, own_head=head, inner_norms=inner):
            if stored not in file.tensors:
                raise FormatError(f"{file.path} lacks the tensor {stored!r}")
            found = file.tensors[stored].shape
            if found != shape:
                raise FormatError(
                    f"{file.path}: {stored!r} has shape {list(found)}, the metadata ask for"
                    f" {list(shape)}"
                )
            self._stored[name] = stored
        self._factors = _factors(file, self._stored.values())
        beside = {_factor_name(stored) for stored in self._factors}
        extra = set(file.tensors) - set(self._stored.values()) - beside - {ROPE_FACTORS}
        if extra:
            raise FormatError(f"{file.path} has the tensor {min(extra)!r}, which is not understood")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.file.tensors[stored].shape for name, stored in self._stored.items()}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        stored = self._name(name)
        if self._permuted(stored):
            heads, within = self._rows(stored, rows or slice(None))
            values = self.file.read(stored, heads)[within]
        else:
            values = self.file.read(stored, rows)
        factor = self._factors.get(stored)
        return values if factor is None else values * factor

    def quantised(self, name: str) -> Quantised | None:
        stored = self._name(name)
        matrix = self.file.quantised(stored)
        if matrix is None:
            return None
        group, scale, read = matrix.group, matrix.scale, matrix.read
        if stored in self._factors:
            scale = scale * self._factors[stored]
        if self._one_scale and group and matrix.kind == "ternary" and (scale == scale[0, 0]).all():
            group, scale = 0, scale[0, :1]
        if not self._permuted(stored):
            return Quantised(matrix.kind, matrix.shape, group, scale, read)

        def read_in_order(rows: slice) -> NDArray[np.int8]:
            heads, within = self._rows(stored, rows)
            return read(heads)[within]

        if group:
            scale = scale[self._rows(stored, slice(None))[1]]
        return Quantised(matrix.kind, matrix.shape, group, scale, read_in_order)

    def block_types(self) -> dict[str, BlockType]:
        """The types of the blocks' matrices, by the file's names."""
        tensors = {stored: self.file.tensors[stored] for stored in self._stored.values()}
        return {
            name: tensor.layout
            for name, tensor in tensors.items()
            if name.startswith("blk.") and len(tensor.shape) == 2
        }

    def _name(self, name: str) -> str:
        if name not in self._stored:
            raise FormatError(f"{self.file.path} lacks the tensor {name!r}")
        return self._stored[name]

    def _permuted(self, stored: str) -> bool:
        return bool(self._head_dim) and is_permuted(stored)

    def _rows(self, stored: str, rows: slice) -> tuple[slice, NDArray[np.int64]]:
        """(the heads in which some of Hugging Face's rows lie, where they lie in these)."""
        start, stop, _ = rows.indices(self.file.tensors[stored].shape[0])
        size = self._head_dim
        head, rest = np.divmod(np.arange(start, stop), size)
        half, pair = np.divmod(rest, size // 2)
        first = start // size * size
        return slice(first, -(-stop // size) * size), head * size + 2 * pair + half - first


def _factor_name(stored: str) -> str:
    return stored.removesuffix("weight") + "scale"


def _factors(file: GgufFile | GgufParts, stored: Iterable[str]) -> dict[str, np.float32]:
    """{matrix of a block: number by which llama.cpp multiplies its products}, of those that have
    one. Raises FormatError for one that is not above 0."""
    found = {}
    for name in stored:
        beside, matrix = file.tensors.get(_factor_name(name)), len(file.tensors[name].shape) == 2
        if not (name.startswith("blk.") and matrix and beside and beside.shape == (1,)):
            continue
        value = found[name] = file.read(_factor_name(name))[0]
        if not value > 0:
            raise FormatError(f"{file.path}: {_factor_name(name)!r} is {value}; it must be above 0")
    return found


def is_permuted(stored: str) -> bool:
    """Whether llama.cpp's converter permutes the rows of a tensor in models of `llama`."""
    return stored.endswith((".attn_q.weight", ".attn_k.weight"))


def stored_order(head_dim: int) -> NDArray[np.int64]:
    """Hugging Face's row of a head that is stored at each place: 2 i + j holds i + j E / 2."""
    pair, half = np.divmod(np.arange(head_dim), 2)
    order: NDArray[np.int64] = pair + half * (head_dim // 2)
    return order


def stored_tensors(
    values: JsonObject, *, own_head: bool, inner_norms: bool = False
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(stored name, Hugging Face's name, shape) of every tensor of a model, but for `ROPE_FACTORS`.

    values: its config.json, all sizes given. own_head: the head is no other name of the embedding.
    inner_norms: each linear of a block has a norm inside.
    """
    sizes = {
        "D": values["hidden_size"],
        "M": values["intermediate_size"],
        "H": values["num_attention_heads"] * values["head_dim"],
        "K": values["num_key_value_heads"] * values["head_dim"],
        "E": values["head_dim"],
        "V": values["vocab_size"],
    }
    for stored, (name, letters) in _OUTER.items():
        if stored != HEAD or own_head:
            yield stored, name, tuple(sizes[letter] for letter in letters)
    parts = {**_BLOCK, **_MORE[values["model_type"]], **(_INNER if inner_norms else {})}
    for layer in range(values["num_hidden_layers"]):
        for part, (inner, letters) in parts.items():
            shape = tuple(sizes[letter] for letter in letters)
            yield f"blk.{layer}.{part}.weight", f"model.layers.{layer}.{inner}.weight", shape
