"""The encoders (BERT, UltraFastBERT) in plain numpy float32: the oracle of the encoder engine.

Every node of an FFF is computed here and the visited ones are picked afterwards, so nothing of
the engine's conditional arithmetic is shared. Sources: arXiv 2311.10770 and the code its authors
published (crammed BERT: pre-norm blocks, scaled sinusoidal positions, FFF of arXiv 2308.14711).

Legend: B sequences, T tokens, D hidden size, H heads, E head size, V rows of an FFF (trees *
nodes), A trees, L levels of a tree (depth + 1), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.formats import capability
from nomatmul.formats.config import ModelConfig
from nomatmul.reference import ops

Float = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderOutput:
    """hidden [B, T, D] after the final norm; paths {layer: row numbers int32 [B*T, A, L]}."""

    hidden_BTD: Float
    paths: dict[int, NDArray[np.int32]] = field(default_factory=dict)


class ReferenceEncoder:
    """An encoder from its config and a function that gives a tensor by our name.

    `tensor` is asked for the names of a training checkpoint (docs/formats.md). Dense layers only.
    """

    def __init__(self, config: ModelConfig, tensor: Callable[[str], Float]) -> None:
        if config.causal:
            raise ValueError("the oracle of encoders runs models that are not causal")
        capability.check(config, "numpy")
        self.config = config
        self.tensor = tensor

    def forward(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None
    ) -> EncoderOutput:
        """Run ids int [B, T]; the mask [B, T] holds 1 for tokens that may be attended to."""
        config = self.config
        ids_BT = np.asarray(input_ids)
        seen_BT = np.ones(ids_BT.shape, bool) if attention_mask is None else attention_mask
        seen_BT = np.asarray(seen_BT).astype(bool)
        x_BTD = self.embed(ids_BT)
        if config.positions == "sinusoidal":
            table_TD = sinusoidal(ids_BT.shape[1], config.hidden_size)
            x_BTD = x_BTD + self.tensor("position_scale") * table_TD
        if config.embedding_norm:
            x_BTD = self._norm(x_BTD, "embedding_norm")
        paths: dict[int, NDArray[np.int32]] = {}
        for layer in range(config.num_layers):
            at = f"layers.{layer}"
            x_BTD = x_BTD + self._attention(self._norm(x_BTD, f"{at}.mixer_norm"), at, seen_BT)
            if config.channel_mixer != "none":
                normed = self._norm(x_BTD, f"{at}.channel_norm")
                x_BTD = x_BTD + self._channel(normed, layer, paths)
        return EncoderOutput(self._norm(x_BTD, "final_norm"), paths)

    def masked_lm(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> Float:
        """Logits [B, T, vocabulary] of the masked language model's head."""
        name = "embedding.weight" if self.config.tie_embeddings else "head.weight"
        return self.forward(input_ids, attention_mask).hidden_BTD @ self.tensor(name).T

    def embed(self, ids_BT: NDArray[np.int64]) -> Float:
        """Rows of the embedding."""
        rows: Float = self.tensor("embedding.weight")[ids_BT]
        return rows

    def _norm(self, x: Float, name: str) -> Float:
        if self.config.norm == "rms":
            return ops.rms_norm(x, self.tensor(f"{name}.weight"), self.config.norm_eps)
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return layer_norm(x, weight, bias, self.config.norm_eps)

    def _attention(self, x_BTD: Float, at: str, seen_BT: NDArray[np.bool_]) -> Float:
        config = self.config
        shape = (*x_BTD.shape[:2], config.num_heads, config.head_size)
        q, k, v = (self.linear(x_BTD, f"{at}.mixer.{c}_proj").reshape(shape) for c in "qkv")
        if config.positions == "rotary":
            places_BT = np.broadcast_to(np.arange(seen_BT.shape[1]), seen_BT.shape)
            q, k = (ops.rotate(part, places_BT, config.rope_theta) for part in (q, k))
        allowed = np.broadcast_to(seen_BT[:, None], (*seen_BT.shape, seen_BT.shape[1]))
        return self.linear(ops.attend(q, k, v, allowed), f"{at}.mixer.o_proj")

    def _channel(self, x_BTD: Float, layer: int, paths: dict[int, NDArray[np.int32]]) -> Float:
        config, at = self.config, f"layers.{layer}.channel"
        kind = config.channel_of(layer)
        if kind == "glu":
            gate, up = np.split(self.linear(x_BTD, f"{at}.gate_proj"), 2, axis=-1)
            gate = ACTIVATIONS[config.glu_activation](gate)
            return self.linear(gate * up, f"{at}.down_proj")
        if kind == "ffn":
            return self._ffn(x_BTD, at)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_ND, paths[layer] = self.trees(x_ND, at)
        y_BTD = y_ND.reshape(x_BTD.shape)
        return y_BTD + self._ffn(x_BTD, f"{at}.master") if config.fff_master_width else y_BTD

    def _ffn(self, x: Float, at: str) -> Float:
        up = ACTIVATIONS[self.config.activation](self.linear(x, f"{at}.up_proj"))
        return self.linear(up, f"{at}.down_proj")

    def linear(self, x: Float, name: str) -> Float:
        """x W^T of the linear `name`."""
        product: Float = x @ self.tensor(f"{name}.weight").T
        return product

    def trees(self, x_ND: Float, at: str) -> tuple[Float, NDArray[np.int32]]:
        """Sum over visited nodes of act(logit) * w_out, and the nodes' rows int32 [N, A, L]."""
        logits_NV = x_ND @ self.tensor(f"{at}.w_in").T
        if self.config.fff_bias:
            logits_NV = logits_NV + self.tensor(f"{at}.bias")
        assert self.config.fff_trees is not None
        assert self.config.fff_depth is not None
        nodes_NAL = walk(logits_NV, self.config.fff_trees, self.config.fff_depth)
        rows_NR = nodes_NAL.reshape(len(x_ND), -1)
        h_NR = ACTIVATIONS[self.config.activation](np.take_along_axis(logits_NV, rows_NR, axis=1))
        return np.einsum("nr,nrd->nd", h_NR, self.tensor(f"{at}.w_out")[rows_NR]), nodes_NAL


def walk(logits_NV: Float, trees: int, depth: int) -> NDArray[np.int32]:
    """Rows visited, int32 [N, A, L]: above 0 goes to child 2j + 2, else to 2j + 1."""
    nodes = 2 ** (depth + 1) - 1
    first_A = np.arange(trees) * nodes
    node_NA = np.zeros((len(logits_NV), trees), np.int64)
    levels = [node_NA + first_A]
    for _ in range(depth):
        right = np.take_along_axis(logits_NV, node_NA + first_A, axis=1) > 0
        node_NA = 2 * node_NA + 1 + right
        levels.append(node_NA + first_A)
    return np.stack(levels, axis=2).astype(np.int32)


def sinusoidal(tokens: int, size: int) -> Float:
    """The table of crammed BERT, [T, D]: sin at even and cos at odd elements, float32."""
    step = np.exp(
        np.arange(0, size, 2, dtype=np.float32) * np.float32(-math.log(10000.0) / size)
    ).astype(np.float32)
    angle = np.arange(tokens, dtype=np.float32)[:, None] * step
    table = np.zeros((tokens, size), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle[:, : size // 2])
    return table


def layer_norm(x: Float, weight: Float, bias: Float, eps: float) -> Float:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; sums in float64."""
    mean = np.mean(x, axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = x - mean
    variance = np.mean(centred * centred, axis=-1, keepdims=True, dtype=np.float64)
    root: Float = np.sqrt(variance.astype(np.float32) + np.float32(eps))
    return centred / root * weight + bias


def relu(x: Float) -> Float:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[Float], Float]] = {
    "gelu": ops.gelu,
    "silu": ops.silu,
    "relu": relu,
}
