"""The tensors of published `crammedBERT` checkpoints: their names, and how ours lie in them.

Attention keeps q, k and v of one head side by side; a glu stores the rows of up first; trees store
the output matrix with a column a node.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.weights import TensorSource
from nomatmul.formats.files.wrappers import missing_tensor

_OUTER = {
    "embedding.weight": "encoder.embedding.word_embedding.weight",
    "position_scale": "encoder.embedding.pos_embedding.scale_factor",
    "embedding_norm": "encoder.embedding.norm",
    "final_norm": "encoder.final_norm",
    "pooler": "pooler.dense",
    "classifier": "head",
}
_INNER = {
    "mixer_norm": "norm1",
    "channel_norm": "norm2",
    "mixer.q_proj": "attn.self_attention.query_key_value",
    "mixer.k_proj": "attn.self_attention.query_key_value",
    "mixer.v_proj": "attn.self_attention.query_key_value",
    "mixer.o_proj": "attn.dense",
    "channel.up_proj": "ffn.dense_in",
    "channel.gate_proj": "ffn.dense_in",
    "channel.down_proj": "ffn.dense_out",
    "channel.w_in": "ffn.linear_in.weight",
    "channel.bias": "ffn.linear_in.bias",
    "channel.w_out": "ffn.linear_out.weight",
}
_TIED = "decoder.weight"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def published_encoder_name(name: str) -> str:
    """Return the stored tensor in which our tensor `name` lies.

    "layers.3.mixer.k_proj.weight" -> "encoder.layers.3.attn.self_attention.query_key_value.weight".
    """
    match = _LAYER.fullmatch(name)
    table, start, rest = (
        (_INNER, f"encoder.layers.{match[1]}.", match[2]) if match else (_OUTER, "", name)
    )
    if rest in table:
        return start + table[rest]
    stem, _, leaf = rest.rpartition(".")
    assert stem in table, f"no published name for {name!r}"
    return f"{start}{table[stem]}.{leaf}"


class EncoderSource(TensorSource):
    """A published encoder's tensors under our names, cut and transposed as our layers want them.

    `expected` gives our names and shapes. Raises FormatError for tensors that are missing,
    misshapen or unknown, and for a tied head that differs from the embedding.
    """

    def __init__(
        self, stored: TensorSource, config: ModelConfig, expected: dict[str, tuple[int, ...]]
    ) -> None:
        self._stored, self._config, self._expected = stored, config, expected
        self.left_out, self.nested = stored.left_out, stored.nested
        shapes = stored.shapes()
        # The authors' bare encoder (AutoModel) has no "encoder." before its names.
        bare = "embedding.word_embedding.weight" in shapes
        self._names = {
            name: published_encoder_name(name).removeprefix("encoder." if bare else "")
            for name in expected
        }
        # Of two tied names the authors' code may store only this one, and reads such a file.
        if self._names["embedding.weight"] not in shapes and _TIED in shapes:
            self._names["embedding.weight"] = _TIED
        for name, other in self._names.items():
            if other not in shapes:
                raise FormatError(missing_tensor(stored, other))
            wanted = self._stored_shape(name)
            if shapes[other] != wanted:
                raise FormatError(
                    f"{other!r} has shape {list(shapes[other])}, the config asks for {list(wanted)}"
                )
        extra = set(shapes) - set(self._names.values())
        for name in sorted(extra):
            if name.endswith(".self_attention.norm_factor"):
                self._check_factor(name)
            elif name == _TIED:
                self._check_tied()
            else:
                raise FormatError(f"the tensor {name!r} is unknown")

    @staticmethod
    def anchors() -> list[str]:
        """Stored names of which every published encoder has one, the bare encoder's last."""
        full = _OUTER["embedding.weight"]
        return [full, _TIED, full.removeprefix("encoder.")]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        shape = self._expected[name]
        if _part(name) is not None:
            return (3 * shape[0], *shape[1:])
        return shape[::-1] if name.endswith(".w_out") else shape

    def _check_factor(self, name: str) -> None:
        """The scale of attention scores is a stored constant; ours is computed."""
        value = float(np.asarray(self._stored.read(name)).reshape(-1)[0])
        wanted = 1 / math.sqrt(self._config.head_size)
        if not math.isclose(value, wanted, rel_tol=2**-7):  # as close as bfloat16 holds it
            raise FormatError(f"{name!r} is {value:.6g}; the number of heads asks for {wanted:.6g}")

    def _check_tied(self) -> None:
        if not np.array_equal(
            self._stored.read(_TIED), self._stored.read(self._names["embedding.weight"])
        ):
            raise FormatError(f"{_TIED!r} differs from the embedding, to which the head is tied")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._expected)

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        other, part = self._names[name], _part(name)
        if part is None and not name.endswith((".w_out", ".gate_proj.weight")):
            return self._stored.read(other, rows)
        values = self._stored.read(other)
        if part is not None:
            heads, size = self._config.num_heads, self._config.head_size
            values = values.reshape(heads, 3, size, -1)[:, part].reshape(heads * size, -1)
        elif name.endswith(".w_out"):
            values = values.T
        else:  # theirs is up, then gate
            values = np.concatenate(np.split(values, 2)[::-1])
        return np.ascontiguousarray(values if rows is None else values[rows])


def _part(name: str) -> int | None:
    """Which third of a head's rows of query_key_value a tensor of ours is, None for others."""
    match = re.search(r"\.mixer\.([qkv])_proj\.weight$", name)
    return "qkv".index(match[1]) if match else None
