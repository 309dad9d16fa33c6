"""The forward pass of a packed encoder over sequences laid end to end, without padding.

Legend: N tokens of all sequences, B sequences, D hidden size, V vocabulary, C classes, A trees,
L levels of a tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.encoder_steps import Float, Norm, Steps, blas_layer, expanded
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.packed_encoder import EncoderReader, Forms, pooler_size
from nomatmul.formats.quantise import from_bfloat16
from nomatmul.reference import ops
from nomatmul.reference.encoder import sinusoidal
from nomatmul.reference.fff import FFFRows

Layer = Callable[[Float], Float]
Paths = dict[int, NDArray[np.int32]]


class Profile:
    """Seconds of each part of a forward pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """What happened since the last mark belongs to nobody."""
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What happened since the last mark belongs to `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def _no_mark(part: str) -> None:
    """Nobody is measuring."""


class EncoderForward:
    """Weights of a packed encoder, and what is computed with them.

    steps: native or numpy (engine/encoder_steps.py). Raises FormatError for damaged tensors.
    """

    def __init__(self, reader: EncoderReader, steps: Steps) -> None:
        self.config, self.forms, self.reading = reader.config, reader.forms, reader.reading
        self.steps = steps
        self._reader = reader
        self.weight_bytes: dict[str, int] = {}
        self._embedding = self._read("embedding.weight", "embedding")
        self._embedding_scale = self._optional("embedding.scale", "embedding")
        config = self.config
        if config.positions == "sinusoidal":
            scale = self._read("position_scale", "norms")
            self._table = scale * sinusoidal(config.max_position_embeddings, config.hidden_size)
        self._embedding_norm = self._norm("embedding_norm") if config.embedding_norm else None
        self._blocks = [_Block(self, layer) for layer in range(config.num_layers)]
        self._final_norm = self._norm("final_norm")
        self._head: Layer | None = None
        if self.reading.task == "masked" and not config.tie_embeddings:
            self._head = self.dense("head")
        self._classifier = self._affine("classifier") if self.reading.task != "masked" else None
        self._pooler = self._affine("pooler") if pooler_size(self.reading) else None

    # -- reading --------------------------------------------------------------------------------

    def _read(self, name: str, part: str) -> NDArray[Any]:
        array = self._reader.read(name)
        self.weight_bytes[part] = self.weight_bytes.get(part, 0) + array.nbytes
        return array

    def _optional(self, name: str, part: str) -> NDArray[Any] | None:
        return self._read(name, part) if name in self._reader.infos else None

    def _norm(self, name: str) -> Norm:
        bias = self._optional(f"{name}.bias", "norms")
        return Norm(self._read(f"{name}.weight", "norms"), bias, self.config.norm_eps)

    def dense(self, name: str, part: str = "dense") -> Layer:
        """A dense matrix as a function of [N, K], in float32 or exact on int8."""
        stored = self._read(f"{name}.weight", part)
        if stored.dtype == np.int8:
            layer: Layer = self.steps.int8_layer(stored, self._read(f"{name}.scale", part))
            return layer
        values = expanded(stored)
        self.weight_bytes[part] += values.nbytes - stored.nbytes
        float_layer: Layer = self.steps.float_layer(values)
        return float_layer

    def _affine(self, name: str) -> Layer:
        matrix, bias = self.dense(name, "head"), self._read(f"{name}.bias", "head")
        return lambda x: matrix(x) + bias

    def trees(self, name: str) -> Any:
        """The layer `name` of trees, as an object with `forward`."""
        config = self.config
        assert config.fff_trees is not None
        assert config.fff_depth is not None
        rows = FFFRows(
            form=self.forms.rows,
            rows=self._read(f"{name}.rows", "trees"),
            trees=config.fff_trees,
            depth=config.fff_depth,
            hidden=config.hidden_size,
            activation=config.activation,
            scales=self._optional(f"{name}.row_scale", "trees"),
            bias=self._optional(f"{name}.bias", "trees"),
        )
        return self.steps.fff_layer(rows)

    # -- computing ------------------------------------------------------------------------------

    def hidden(
        self,
        ids_N: NDArray[np.int64],
        offsets_B: NDArray[np.int64],
        seen_N: NDArray[np.uint8] | None = None,
        *,
        paths: Paths | None = None,
        profile: Profile | None = None,
    ) -> Float:
        """Final-normed hidden states [N, D] of sequences offsets[b]..offsets[b + 1].

        seen: 0 hides a token from all others of its sequence. paths: a dict that receives the
        visited rows int32 [N, A, L] of each layer of trees. Raises ValueError where a value
        inside the model is not finite.
        """
        mark = profile.mark if profile is not None else _no_mark
        places_N = np.arange(len(ids_N)) - np.repeat(offsets_B[:-1], np.diff(offsets_B))
        x = self._embed(ids_N)
        if self.config.positions == "sinusoidal":
            x += self._table[places_N]
        if self._embedding_norm is not None:
            x = self.steps.add_norm(x, None, self._embedding_norm)
        mark("embedding")
        delta: Float | None = None
        for layer, block in enumerate(self._blocks):
            h = self.steps.add_norm(x, delta, block.mixer_norm)
            mark("norms")
            qkv = block.qkv(h)
            mark("projections")
            if self.config.positions == "rotary":
                self._rotate(qkv, places_N)
            mixed = self.steps.attention(qkv, offsets_B, seen_N, self.config.num_heads)
            mark("attention core")
            delta = block.output(mixed)
            mark("projections")
            if block.kind != "none":
                assert block.channel_norm is not None
                h = self.steps.add_norm(x, delta, block.channel_norm)
                mark("norms")
                delta = block.channel(h, layer, paths)
                mark("channel mixer")
        x = self.steps.add_norm(x, delta, self._final_norm)
        mark("norms")
        return x

    def vocabulary_logits(self, hidden_ND: Float) -> Float:
        """[N, V] of the masked language model."""
        if self._head is None:
            scale = self._embedding_scale
            if scale is not None:
                self._head = self.steps.int8_layer(self._embedding, scale)
            else:
                # by the BLAS, which reads the embedding as it lies: no second copy of it
                self._head = blas_layer(expanded(self._embedding))
        return self._head(hidden_ND)

    def classes(self, x: Float) -> Float:
        """[., C] of pooled states (sequence) or hidden states (token)."""
        assert self._classifier is not None
        if self._pooler is not None:
            x = self._pooler(x)
        if self.reading.task == "sequence":
            kind = self.reading.head.pooler_activation
            x = np.tanh(x) if kind == "tanh" else self.steps.activate(x, kind)
        return self._classifier(x)

    def _embed(self, ids_N: NDArray[np.int64]) -> Float:
        rows: NDArray[Any] = self._embedding[ids_N]
        if rows.dtype == np.uint16:
            return from_bfloat16(rows)
        if self._embedding_scale is not None:
            return rows.astype(np.float32) * self._embedding_scale[ids_N, None]
        return rows

    def _rotate(self, qkv: Float, places_N: NDArray[np.int64]) -> None:
        size = self.config.hidden_size
        for first in (0, size):  # q, then k
            part = qkv[:, first : first + size]
            heads = part.reshape(1, len(part), self.config.num_heads, self.config.head_size)
            turned = ops.rotate(heads, places_N[None], self.config.rope_theta)
            part[:] = turned.reshape(part.shape)


class _Block:
    """One block's layers."""

    def __init__(self, owner: EncoderForward, layer: int) -> None:
        at, config = f"layers.{layer}", owner.config
        self.steps, self.kind = owner.steps, config.channel_of(layer)
        self._activation = config.glu_activation if self.kind == "glu" else config.activation
        self.mixer_norm = owner._norm(f"{at}.mixer_norm")
        self.qkv = owner.dense(f"{at}.mixer.qkv_proj")
        self.output = owner.dense(f"{at}.mixer.o_proj")
        self.channel_norm = owner._norm(f"{at}.channel_norm") if self.kind != "none" else None
        self._trees: Any = None
        self._first: Layer | None = None
        if self.kind == "fff":
            self._trees = owner.trees(f"{at}.channel")
            self._shape = (config.fff_trees or 0, (config.fff_depth or 0) + 1)
        names = {
            "glu": ("gate_proj", "down_proj"),
            "ffn": ("up_proj", "down_proj"),
            "fff": ("master.up_proj", "master.down_proj") if config.fff_master_width else None,
        }.get(self.kind)
        if names is not None:
            self._first = owner.dense(f"{at}.channel.{names[0]}")
            self._last = owner.dense(f"{at}.channel.{names[1]}")

    def channel(self, h: Float, layer: int, paths: Paths | None) -> Float:
        """The channel mixer of normed h [N, D]; the visited rows go into `paths`."""
        y = self._dense(h) if self._first is not None else None
        if self._trees is None:
            assert y is not None
            return y
        out = np.empty_like(h)
        rows = np.empty((len(h), *self._shape), np.int32) if paths is not None else None
        self._trees.forward(h, out, rows)
        if paths is not None and rows is not None:
            paths[layer] = rows
        return out if y is None else out + y

    def _dense(self, h: Float) -> Float:
        assert self._first is not None
        inner = self._first(h)
        if self.kind == "glu":
            half = inner.shape[1] // 2
            gate = self.steps.activate(np.ascontiguousarray(inner[:, :half]), self._activation)
            return self._last(gate * inner[:, half:])
        return self._last(self.steps.activate(inner, self._activation))


def pooled(
    hidden_TD: Float, seen_T: NDArray[np.bool_], reading: EncoderReading, how: str | None = None
) -> Float:
    """[D] of one sequence's hidden states, as the classifier's head says, or by `how`.

    Tokens that are not seen count only where the head pools over padding.
    """
    head = reading.head
    how = head.pooler if how is None else how
    if how == "zero_index":
        return hidden_TD[0]
    kept = hidden_TD if head.pool_padding else hidden_TD[seen_T]
    if how == "avg":
        return kept.mean(axis=0)
    top = kept.max(axis=0)
    return top if how == "max" else top + np.log(np.exp(kept - top).sum(axis=0))


__all__ = ["EncoderForward", "Forms", "Profile", "pooled"]
