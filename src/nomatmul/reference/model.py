"""The whole forward pass in numpy: the model that all other backends are tested against.

Legend: B sequences, T tokens, S tokens of the state and these, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.formats import architecture as parts
from nomatmul.formats import capability
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference import ops
from nomatmul.reference.activations import Float
from nomatmul.reference.channels import CHANNELS, Channel
from nomatmul.reference.linear import Linear
from nomatmul.reference.mixers import MIXERS, Pieces, Tokens
from nomatmul.reference.trees import Rows
from nomatmul.reference.weights import FloatWeights, PackedWeights, Weights


@dataclass(frozen=True)
class State:
    """What a batch of sequences leaves behind: the pieces of each layer, and seen [B, S], False
    where a position is padding. No array is ever changed in place."""

    layers: list[Pieces]
    seen_BS: NDArray[np.bool_]

    @property
    def positions_B(self) -> NDArray[np.int64]:
        """Tokens so far; padding takes no position."""
        positions_B: NDArray[np.int64] = self.seen_BS.sum(axis=1)
        return positions_B

    def copy(self) -> State:
        """An independent copy, which shares the arrays."""
        return State([dict(pieces) for pieces in self.layers], self.seen_BS)


@dataclass(frozen=True)
class Output:
    """Result of a forward pass: hidden [B, T, D] after the final norm; the new state; paths {layer:
    rows [B * T, trees, levels]}; and, if asked for, `inputs`: that of each block, and hidden."""

    hidden_BTD: Float
    state: State
    paths: dict[int, Rows]
    head: Linear | None
    inputs: list[Float] = field(default_factory=list)

    @cached_property
    def logits_BTV(self) -> Float:
        """The head's float32 logits, computed when first asked for."""
        assert self.head is not None
        return self.head(self.hidden_BTD)


class ReferenceModel:
    """A model, decoder or encoder, computed in numpy float32 with exact accumulators.

    head: whether it has that of a language model; an encoder may end in another.
    Raises ValueError for parts that numpy has not (formats/capability.py).
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, head: bool = True) -> None:
        capability.check(config, "numpy")
        model = parts.architecture_of(config)
        self.config, self.max_length = config, model.max_length
        self.embedding_VD = weights.embedding()
        self.position_scale = weights.vector("position_scale") if model.sinusoidal else None
        self.embedding_norm: Callable[[Float], Float] | None = None
        if model.embedding_norm is not None:
            self.embedding_norm = weights.norm("embedding_norm", model.embedding_norm)
        self.blocks = [Block(part, weights, layer) for layer, part in enumerate(model.blocks)]
        self.final_norm = weights.norm("final_norm", model.final_norm)
        self.head = weights.linear("head", model.head) if head else None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ReferenceModel:
        """Build from a published or training checkpoint (weights are quantised here), or a
        packed one."""
        if checkpoint.packed is not None:
            return cls.from_packed(checkpoint.packed)
        head = checkpoint.reading is None or checkpoint.reading.task == "masked"
        weights = FloatWeights(checkpoint.read, checkpoint.quantised)
        return cls(checkpoint.config, weights, head=head)

    @classmethod
    def from_packed(
        cls, reader: PackedReader, *, head: bool = True, kv: str = "f16"
    ) -> ReferenceModel:
        """Build from a packed directory: its values and scales as they are; kv: how a decoder's
        states keep keys and values, "f16", "int8" or "f32"."""
        return cls(reader.config, PackedWeights(reader, kv), head=head)

    @classmethod
    def load(cls, directory: str | Path) -> ReferenceModel:
        """Open a model directory of any kind; raises ValueError for a bad one."""
        return cls.from_checkpoint(open_checkpoint(directory))

    def new_state(self, batch: int = 1) -> State:
        """Return the empty memory of `batch` sequences."""
        return State([block.new_state(batch) for block in self.blocks], np.zeros((batch, 0), bool))

    def forward(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        state: State | None = None,
        *,
        chunk: int | None = None,
        keep_inputs: bool = False,
    ) -> Output:
        """Run ids int [B, T] (or [T]) through the model, after `state` where one is given.

        attention_mask [B, T] holds 1 for tokens and 0 for padding, anywhere. `chunk` computes MLGRU
        by chunks of that many tokens instead of token by token. Raises ValueError for ids
        outside the vocabulary, an empty input, more tokens than a model with attention has
        positions, a mask of another shape or with other values, and a state of another batch or
        handed to an encoder, which has none.
        """
        ids_BT = self._checked_ids(input_ids)
        mask_BT = _checked_mask(attention_mask, ids_BT.shape)
        tokens, old = self._tokens(mask_BT, state, chunk)
        x_BTD = self._embedded(ids_BT)
        inputs, layers, paths = [x_BTD], [], {}
        for layer, (block, pieces) in enumerate(zip(self.blocks, old.layers, strict=True)):
            x_BTD, pieces, rows = block(x_BTD, pieces, tokens)
            inputs.append(x_BTD)
            layers.append(pieces)
            if rows is not None:
                paths[layer] = rows
        inputs[-1] = self.final_norm(x_BTD)
        new = State(layers, tokens.seen_BS)
        return Output(inputs[-1], new, paths, self.head, inputs if keep_inputs else [])

    def _embedded(self, ids_BT: NDArray[np.int64]) -> Float:
        x_BTD: Float = self.embedding_VD[ids_BT]
        if self.position_scale is not None:
            x_BTD = x_BTD + self.position_scale * ops.sinusoidal(*x_BTD.shape[1:])
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _tokens(
        self, mask_BT: NDArray[np.bool_], state: State | None, chunk: int | None
    ) -> tuple[Tokens, State]:
        if state is None:
            state = self.new_state(len(mask_BT))
        elif not self.config.causal:
            raise ValueError("an encoder has no state, which a sequence could go on from")
        if len(state.seen_BS) != len(mask_BT):
            raise ValueError(
                f"the state holds {len(state.seen_BS)} sequences, the input {len(mask_BT)}"
            )
        seen_BS = np.concatenate([state.seen_BS, mask_BT], axis=1)
        longest, limit = int(seen_BS.sum(axis=1).max()), self.max_length
        if self.config.causal and limit is not None and longest > limit:
            raise ValueError(f"a sequence of {longest} tokens is longer than the {limit} positions")
        if self.config.causal:
            # Padding takes no position, so a padded sequence is rotated like a plain one.
            counted_BT = state.positions_B[:, None] + np.cumsum(mask_BT, axis=1)
            positions_BT = np.maximum(counted_BT - 1, 0)
        else:
            positions_BT = np.broadcast_to(np.arange(mask_BT.shape[1]), mask_BT.shape)
        return Tokens(mask_BT, seen_BS, positions_BT, chunk), state

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

    def __init__(self, part: parts.Block, weights: Weights, layer: int) -> None:
        at = f"layers.{layer}"
        self.part = part
        self.mixer_norm = weights.norm(f"{at}.mixer_norm", part.mixer_norm)
        self.mixer = MIXERS[part.mixer.kind](part.mixer, weights, layer)
        self.channel: Channel | None = None
        if part.channel_norm is not None and part.channel is not None:
            self.channel_norm = weights.norm(f"{at}.channel_norm", part.channel_norm)
            self.channel = CHANNELS[part.channel.kind](part.channel, weights, f"{at}.channel")

    def new_state(self, batch: int) -> Pieces:
        """Return this layer's empty memory."""
        return {
            piece.name: np.zeros((batch, *([0] if piece.grows else []), *piece.shape), np.float32)
            for piece in self.part.mixer.state()
        }

    def __call__(
        self, x_BTD: Float, state: Pieces, tokens: Tokens
    ) -> tuple[Float, Pieces, Rows | None]:
        """Return (the block's output [B, T, D], the layer's new state, rows that were visited)."""
        mixed_BTD, state = self.mixer(self.mixer_norm(x_BTD), state, tokens)
        x_BTD = x_BTD + mixed_BTD
        if self.channel is None:
            return x_BTD, state, None
        mixed_BTD, rows = self.channel(self.channel_norm(x_BTD))
        return x_BTD + mixed_BTD, state, rows


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
