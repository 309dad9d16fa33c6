"""The whole forward pass in numpy: the model that all other backends are tested against.

Legend: B sequences, T tokens, S cached and new tokens, D hidden size, V vocabulary, H heads,
E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.formats.quantise import quantise_weight
from nomatmul.reference import ops
from nomatmul.reference.ops import BitLinear, DenseLinear, Float, Linear
from nomatmul.reference.ternary_fff import TernaryFFF


@dataclass
class LayerState:
    """What one layer remembers: MLGRU's h [B, D], or attention's keys, values and their mask."""

    h_BD: Float | None = None
    k_BSHE: Float | None = None
    v_BSHE: Float | None = None
    seen_BS: NDArray[np.bool_] | None = None


@dataclass
class State:
    """The memory of a batch of sequences between calls; `copy` forks it."""

    layers: list[LayerState]
    positions_B: NDArray[np.int64]

    def copy(self) -> State:
        """Return an independent copy (no array is ever changed in place, so they are shared)."""
        return State([LayerState(**vars(layer)) for layer in self.layers], self.positions_B)


@dataclass
class Output:
    """Result of a forward pass: float32 logits [B, T, V], the new state, and, if asked for,
    hidden [B, T, D] of every block's input followed by the final norm's output."""

    logits_BTV: Float
    state: State
    hidden: list[Float] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """How a model gets its weights: a float32 tensor, a linear layer or an FFF by its name."""

    vector: Callable[[str], Float]
    linear: Callable[[str], Linear]
    fff: Callable[[str], TernaryFFF]


class ReferenceModel:
    """A model of any dials, computed in numpy float32 with exact accumulators.

    Norms are "rms" ones, positions rotary or none, and an FFF is ternary, of trees of neurons.
    Made by `from_checkpoint` or `from_packed` (or `load` for a directory of either kind).
    """

    def __init__(self, config: ModelConfig, parts: Parts, lower_bounds_LD: Float) -> None:
        capability.check(config, "numpy")
        self.config = config
        self.embedding_VD = parts.vector("embedding.weight")
        self.blocks = [
            Block(config, layer, parts, lower_bounds_LD[layer])
            for layer in range(config.num_layers)
        ]
        self.final_norm = parts.vector("final_norm.weight")
        self.head = parts.linear("head")

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ReferenceModel:
        """Build from a published or training checkpoint (weights are quantised here), or a
        packed one."""
        if checkpoint.packed is not None:
            return cls.from_packed(checkpoint.packed)
        config = checkpoint.config

        def linear(name: str) -> Linear:
            weight = checkpoint.read(f"{name}.weight")
            if config.linear == "dense":
                return DenseLinear(weight)
            t_NK, scale = quantise_weight(weight)
            norm = checkpoint.read(f"{name}.norm.weight")
            return BitLinear(t_NK, scale, norm, config.linear_norm_eps)

        def fff(name: str) -> TernaryFFF:
            weights = [quantise_weight(checkpoint.read(f"{name}.w_{way}")) for way in ("in", "out")]
            (t_in_VD, scale_in), (t_out_VD, scale_out) = weights
            scales = np.array([scale_in, scale_out], dtype=np.float32)
            return TernaryFFF.build(config, name, t_in_VD, t_out_VD, scales, checkpoint.read)

        bounds = np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
        if architecture_of(config).bounded:
            bounds = cumulative_lower_bounds(checkpoint.read("lower_bounds"))
        return cls(config, Parts(checkpoint.read, linear, fff), bounds)

    @classmethod
    def from_packed(cls, reader: PackedReader) -> ReferenceModel:
        """Build from a packed directory: its ternary values and scales as they are."""
        config = reader.config

        def linear(name: str) -> Linear:
            t_NK, scale = reader.ternary(name)
            norm = reader.read_float32(f"{name}.norm.weight")
            return BitLinear(t_NK, scale, norm, config.linear_norm_eps)

        def fff(name: str) -> TernaryFFF:
            t_V2D, scales = reader.ternary_rows(f"{name}.rows")
            t_in_VD, t_out_VD = np.ascontiguousarray(t_V2D.swapaxes(0, 1))
            return TernaryFFF.build(config, name, t_in_VD, t_out_VD, scales, reader.read_float32)

        bounds = np.zeros((config.num_layers, config.hidden_size), dtype=np.float32)
        if config.token_mixer == "mlgru":
            for layer in range(config.num_layers):
                bounds[layer] = reader.read_float32(f"layers.{layer}.mixer.lower_bound")
        return cls(config, Parts(reader.read_float32, linear, fff), bounds)

    @classmethod
    def load(cls, directory: str | Path) -> ReferenceModel:
        """Open a model directory of any kind; raises ValueError for a bad one."""
        return cls.from_checkpoint(open_checkpoint(directory))

    def new_state(self, batch: int = 1) -> State:
        """Return the empty memory of `batch` sequences."""
        return State([block.new_state(batch) for block in self.blocks], np.zeros(batch, np.int64))

    def forward(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        state: State | None = None,
        *,
        chunk: int | None = None,
        keep_hidden: bool = False,
    ) -> Output:
        """Run ids int [B, T] (or [T]) through the model, after `state` where one is given.

        attention_mask [B, T] holds 1 for tokens and 0 for padding, anywhere. `chunk` computes MLGRU
        by chunks of that many tokens instead of token by token. Raises ValueError for ids
        outside the vocabulary, an empty input or a mask of another shape or with other values.
        """
        ids_BT = self._checked_ids(input_ids)
        mask_BT = _checked_mask(attention_mask, ids_BT.shape)
        old = state if state is not None else self.new_state(ids_BT.shape[0])
        if len(old.positions_B) != ids_BT.shape[0]:
            raise ValueError(
                f"the state holds {len(old.positions_B)} sequences, the input {ids_BT.shape[0]}"
            )
        # Padding does not count as a position, so a padded sequence is turned like a plain one.
        counted = np.cumsum(mask_BT, axis=1)
        positions_BT = np.maximum(old.positions_B[:, None] + counted - 1, 0)
        x_BTD = self.embedding_VD[ids_BT]
        hidden, layers = [x_BTD], []
        for block, memory in zip(self.blocks, old.layers, strict=True):
            x_BTD, memory = block(x_BTD, memory, mask_BT, positions_BT, chunk)
            hidden.append(x_BTD)
            layers.append(memory)
        hidden[-1] = ops.rms_norm(x_BTD, self.final_norm, self.config.norm_eps)
        new = State(layers, old.positions_B + counted[:, -1])
        return Output(self.head(hidden[-1]), new, hidden if keep_hidden else [])

    def _checked_ids(self, input_ids: ArrayLike) -> NDArray[np.int64]:
        ids = np.asarray(input_ids)
        ids_BT = ids[None] if ids.ndim == 1 else ids
        if ids_BT.ndim != 2 or ids_BT.size == 0:
            raise ValueError(f"token ids must be a non-empty [B, T], got shape {list(ids.shape)}")
        if not np.issubdtype(ids_BT.dtype, np.integer):
            raise ValueError(f"token ids must be whole numbers, got {ids_BT.dtype}")
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is out of range; the vocabulary is 0..{self.config.vocab_size - 1}"
            )
        return ids_BT.astype(np.int64)


class Block:
    """One block: x += token_mixer(norm(x)); x += channel_mixer(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        parts: Parts,
        lower_bound_D: Float,
    ) -> None:
        self.config = config
        at = f"layers.{layer}"
        self.mixer_norm = parts.vector(f"{at}.mixer_norm.weight")
        letters = "ifgo" if config.token_mixer == "mlgru" else "qkvo"
        self.mixer = {c: parts.linear(f"{at}.mixer.{c}_proj") for c in letters}
        if config.token_mixer == "mlgru":
            self.g_norm = parts.vector(f"{at}.mixer.g_norm.weight")
        # The first layer has no bound, and neither has a model without the table.
        bounded = architecture_of(config).bounded and layer > 0
        self.lower_bound_D = lower_bound_D if bounded else None
        self.channel: dict[str, Linear] = {}
        self.fff: TernaryFFF | None = None
        if config.channel_mixer == "none":
            return
        self.channel_norm = parts.vector(f"{at}.channel_norm.weight")
        kind, where = config.channel_of(layer), f"{at}.channel"
        if kind == "fff":
            self.fff = parts.fff(where)
            where += ".master"
            if not config.fff_master_width:
                return
        first = "gate" if kind == "glu" else "up"
        self.channel = {c: parts.linear(f"{where}.{c}_proj") for c in (first, "down")}

    def new_state(self, batch: int) -> LayerState:
        """Return this layer's empty memory."""
        if self.config.token_mixer == "mlgru":
            return LayerState(h_BD=np.zeros((batch, self.config.hidden_size), np.float32))
        empty = np.zeros((batch, 0, self.config.num_heads, self.config.head_size), np.float32)
        return LayerState(k_BSHE=empty, v_BSHE=empty, seen_BS=np.zeros((batch, 0), bool))

    def __call__(
        self,
        x_BTD: Float,
        state: LayerState,
        mask_BT: NDArray[np.bool_],
        positions_BT: NDArray[np.int64],
        chunk: int | None = None,
    ) -> tuple[Float, LayerState]:
        """Return (the block's output [B, T, D], the layer's new memory)."""
        normed = ops.rms_norm(x_BTD, self.mixer_norm, self.config.norm_eps)
        if self.config.token_mixer == "mlgru":
            mixed, state = self._mlgru(normed, state, mask_BT, chunk)
        else:
            mixed, state = self._attention(normed, state, mask_BT, positions_BT)
        x_BTD = x_BTD + mixed
        if self.config.channel_mixer == "none":
            return x_BTD, state
        normed = ops.rms_norm(x_BTD, self.channel_norm, self.config.norm_eps)
        return x_BTD + self._channel(normed), state

    def _mlgru(
        self, x_BTD: Float, state: LayerState, mask_BT: NDArray[np.bool_], chunk: int | None
    ) -> tuple[Float, LayerState]:
        assert state.h_BD is not None
        i_BTD, f_BTD = ops.mlgru_gates(
            self.mixer["i"](x_BTD), self.mixer["f"](x_BTD), self.lower_bound_D
        )
        i_BTD = i_BTD * mask_BT[..., None].astype(np.float32)
        f_BTD = np.where(mask_BT[..., None], f_BTD, np.float32(1))
        if chunk is None:
            h_BTD, last = ops.mlgru_recurrent(i_BTD, f_BTD, state.h_BD)
        else:
            h_BTD, last = ops.mlgru_chunked(i_BTD, f_BTD, state.h_BD, chunk)
        g = ops.rms_norm(self.mixer["g"](x_BTD), self.g_norm, self.config.gate_norm_eps)
        return self.mixer["o"](g * ops.silu(h_BTD)), LayerState(h_BD=last)

    def _attention(
        self,
        x_BTD: Float,
        state: LayerState,
        mask_BT: NDArray[np.bool_],
        positions_BT: NDArray[np.int64],
    ) -> tuple[Float, LayerState]:
        assert state.k_BSHE is not None
        assert state.v_BSHE is not None
        assert state.seen_BS is not None
        batch, tokens, _ = x_BTD.shape
        shape = (batch, tokens, self.config.num_heads, self.config.head_size)
        theta = self.config.rope_theta
        q_BTHE = ops.rotate(self.mixer["q"](x_BTD).reshape(shape), positions_BT, theta)
        k_BTHE = ops.rotate(self.mixer["k"](x_BTD).reshape(shape), positions_BT, theta)
        k_BSHE = np.concatenate([state.k_BSHE, k_BTHE], axis=1)
        v_BSHE = np.concatenate([state.v_BSHE, self.mixer["v"](x_BTD).reshape(shape)], axis=1)
        seen_BS = np.concatenate([state.seen_BS, mask_BT], axis=1)
        total = seen_BS.shape[1]
        reach_TS = np.tri(tokens, total, total - tokens, dtype=bool)
        if not self.config.causal:
            reach_TS = np.ones_like(reach_TS)
        mixed = ops.attend(q_BTHE, k_BSHE, v_BSHE, reach_TS[None] & seen_BS[:, None])
        return self.mixer["o"](mixed), LayerState(k_BSHE=k_BSHE, v_BSHE=v_BSHE, seen_BS=seen_BS)

    def _channel(self, x_BTD: Float) -> Float:
        trees = self.fff(x_BTD) if self.fff is not None else None
        if trees is not None and not self.channel:
            return trees
        if "gate" in self.channel:
            gate, up = np.split(self.channel["gate"](x_BTD), 2, axis=-1)
            return self.channel["down"](ops.silu(gate) * up)
        act = ops.ACTIVATIONS[self.config.activation]
        out = self.channel["down"](act(self.channel["up"](x_BTD)))
        return out if trees is None else trees + out


def _checked_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(shape, dtype=bool)
    mask_BT = np.asarray(mask)
    mask_BT = mask_BT[None] if mask_BT.ndim == 1 else mask_BT
    if mask_BT.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask_BT.shape)}, the token ids {list(shape)}"
        )
    if not np.all((mask_BT == 0) | (mask_BT == 1)):
        raise ValueError("attention_mask must hold 0 and 1 only")
    return mask_BT.astype(bool)
