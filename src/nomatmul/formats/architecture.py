"""The table of parts: a model described once, layer by layer, for every room to walk.

A model is an embedding, blocks, a final norm and a head; a block is
`x += mixer(mixer_norm(x)); x += channel(channel_norm(x))`. Each part is a frozen dataclass whose
fields are named like the tensors that they stand for: the field `i_proj` of the mixer of layer 0
is the linear "layers.0.mixer.i_proj". So one walk gives names and shapes to all rooms, and a new
token mixer or channel mixer is one dataclass here and one file in each room that computes it.

Legend: V vocabulary, D hidden size, M intermediate size, L layers, R rows (nodes of all trees of a
layer), C positions of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from nomatmul.formats.dials import Dials
from nomatmul.formats.parts import (
    FFF,
    FFN,
    GLU,
    MLGRU,
    Attention,
    Block,
    ChannelMixer,
    Embedding,
    Linear,
    Norm,
    Part,
    Piece,
    Shape,
    TokenMixer,
    leaves_of,
    linears_of,
)

__all__ = [
    "CHANNEL_MIXERS",
    "FFF",
    "FFN",
    "GLU",
    "MLGRU",
    "TOKEN_MIXERS",
    "Architecture",
    "Attention",
    "Block",
    "ChannelMixer",
    "Embedding",
    "Linear",
    "Norm",
    "Part",
    "Piece",
    "Shape",
    "TokenMixer",
    "architecture_of",
    "linears_of",
]


@dataclass(frozen=True)
class Architecture:
    """All parts of a model. `positions`: those that it was made for, which no sequence of a model
    with attention may exceed. `sinusoidal`: positions are added to the embedding, with one learned
    scale (crammed BERT)."""

    embedding: Embedding
    positions: int
    sinusoidal: bool
    embedding_norm: Norm | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Linear

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.embedding.vocabulary

    @property
    def size(self) -> int:
        """The hidden size."""
        return self.embedding.size

    def linears(self) -> dict[str, Linear]:
        """{name: linear} in the order of use: "layers.0.mixer.i_proj", ..., "head"."""
        found = {
            f"layers.{layer}.{name}": linear
            for layer, block in enumerate(self.blocks)
            for name, linear in linears_of(block)
        }
        return {**found, "head": self.head}

    def norms(self) -> dict[str, Norm]:
        """{name: norm} of all norms outside the linears, in the order of use."""
        found = {} if self.embedding_norm is None else {"embedding_norm": self.embedding_norm}
        for layer, block in enumerate(self.blocks):
            for name, leaf in leaves_of(block):
                if isinstance(leaf, Norm):
                    found[f"layers.{layer}.{name}"] = leaf
        return {**found, "final_norm": self.final_norm}

    def trees(self) -> dict[str, FFF]:
        """{name: trees} of the layers that have some: "layers.0.channel", ..."""
        return {
            f"layers.{layer}.channel": block.channel
            for layer, block in enumerate(self.blocks)
            if isinstance(block.channel, FFF)
        }

    def lower_bounds(self) -> dict[str, int]:
        """{name: size} of the lower bounds of recurrences, bounded or not (then they are zero)."""
        return {
            f"layers.{layer}.mixer.lower_bound": block.mixer.i_proj.outputs
            for layer, block in enumerate(self.blocks)
            if isinstance(block.mixer, MLGRU)
        }

    @property
    def is_ternary(self) -> bool:
        """Whether any linear or trees have ternary weights."""
        kinds = [linear.kind for linear in self.linears().values()]
        return "ternary" in [*kinds, *(trees.linear for trees in self.trees().values())]

    @property
    def bounded(self) -> bool:
        """Whether the model owns the table `lower_bounds` [L, D]."""
        return any(isinstance(b.mixer, MLGRU) and b.mixer.bounded for b in self.blocks)

    @property
    def max_length(self) -> int | None:
        """The longest sequence; None where nothing looks back at positions."""
        attends = any(isinstance(block.mixer, Attention) for block in self.blocks)
        return self.positions if attends else None

    @property
    def recurrent(self) -> bool:
        """Whether a sequence leaves behind a state of one size, whatever its length."""
        states = [block.mixer.state() for block in self.blocks]
        return all(state and not any(piece.grows for piece in state) for state in states)

    def norm_tensors(self) -> dict[str, Shape]:
        """{tensor name: shape} of `norms`."""
        return _tensors(self.norms())

    def mixer_tensors(self) -> dict[str, Shape]:
        """{tensor name: shape} of what belongs to a token mixer, and to no linear or norm."""
        found: dict[str, Shape] = {}
        for layer, block in enumerate(self.blocks):
            found |= _own_tensors(f"layers.{layer}.mixer", block.mixer)
        return found

    def tensors(self) -> dict[str, Shape]:
        """{tensor name: shape} of a training checkpoint: the torch state dict."""
        found: dict[str, Shape] = {"embedding.weight": (self.vocabulary, self.size)}
        if self.sinusoidal:
            found["position_scale"] = (1,)
        if self.bounded:
            found["lower_bounds"] = (len(self.blocks), self.size)
        found |= self.norm_tensors() | _tensors(self.linears())
        for name, trees in self.trees().items():
            found |= _own_tensors(name, trees)
        return found | self.mixer_tensors()

    def parameters(self) -> int:
        """Stored parameters; a tied head is counted once."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def _own_tensors(name: str, part: Part) -> dict[str, Shape]:
    return {f"{name}.{key}": shape for key, shape in part.own_tensors().items()}


def _tensors(leaves: dict[str, Norm] | dict[str, Linear]) -> dict[str, Shape]:
    return {
        f"{name}.{key}": shape
        for name, leaf in leaves.items()
        for key, shape in leaf.tensors().items()
    }


@functools.lru_cache(maxsize=64)
def architecture_of(config: Dials) -> Architecture:
    """The parts that the dials and sizes of a config stand for."""
    size, eps = config.hidden_size, config.norm_eps
    return Architecture(
        embedding=_embedding(config),
        positions=config.max_position_embeddings,
        sinusoidal=config.positions == "sinusoidal",
        embedding_norm=Norm(config.norm, size, eps) if config.embedding_norm else None,
        blocks=tuple(_block(config, layer) for layer in range(config.num_layers)),
        final_norm=Norm(config.norm, size, eps),
        head=dataclasses.replace(
            _linear(config, config.vocab_size, size, kind=config.head_kind),
            tied=config.tie_embeddings,
        ),
    )


def _embedding(config: Dials) -> Embedding:
    sizes = config.vocab_size, config.hidden_size
    group = config.scale_group if config.embedding_linear == "ternary" else 0
    return Embedding(config.embedding_linear, *sizes, group)


def _linear(
    config: Dials,
    outputs: int,
    inputs: int,
    *,
    sub: bool = False,
    kind: str = "",
    scale_rows: int = 0,
) -> Linear:
    """sub: whether it has a norm inside where only sub-norms are."""
    kind = kind or config.linear
    if kind == "dense":
        return Linear(kind, outputs, inputs, None)
    inside = config.linear_norm == "all" or (config.linear_norm == "sub" and sub)
    eps, group = config.linear_norm_eps if inside else None, config.scale_group
    rows, rounding = (1, "even") if group else (scale_rows, config.rounding)
    return Linear(kind, outputs, inputs, eps, False, rows, group, rounding)


def _block(config: Dials, layer: int) -> Block:
    channel = CHANNEL_MIXERS[config.channel_of(layer)](config)
    norm = Norm(config.norm, config.hidden_size, config.norm_eps)
    mixer = TOKEN_MIXERS[config.token_mixer](config)
    return Block(norm, mixer, norm if channel is not None else None, channel)


def _mlgru(config: Dials) -> MLGRU:
    size = config.hidden_size
    square = _linear(config, size, size)
    norm = Norm("rms", size, config.gate_norm_eps)
    return MLGRU(square, square, square, square, norm, config.use_lower_bound)


def _attention(config: Dials) -> Attention:
    size, heads, kv_heads = config.hidden_size, config.num_heads, config.kv_heads
    head_size = config.head_size
    rows = _linear(config, kv_heads * head_size, size)
    norm = Norm("rms", head_size, config.norm_eps) if config.qk_norm else None
    return Attention(
        q_proj=_linear(config, heads * head_size, size),
        k_proj=rows,
        v_proj=rows,
        o_proj=_linear(config, size, heads * head_size, sub=True),
        q_norm=norm,
        k_norm=norm,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        causal=config.causal,
        theta=config.rope_theta if config.positions == "rotary" else None,
        scaling=config.rope_scaling,
    )


def _glu(config: Dials) -> GLU:
    size, inner = config.hidden_size, config.mlp_size
    down = _linear(config, size, inner, sub=True)
    if config.split_gate and config.linear_norm == "all":
        part = _linear(config, inner, size)
        return GLU(part, down, config.glu_activation, part)
    gate = _linear(config, 2 * inner, size, scale_rows=inner if config.split_gate else 0)
    return GLU(gate, down, config.glu_activation)


def _ffn(config: Dials, inner: int | None = None) -> FFN:
    size, inner = config.hidden_size, config.mlp_size if inner is None else inner
    up, down = _linear(config, inner, size), _linear(config, size, inner, sub=True)
    return FFN(up, down, config.activation)


def _fff(config: Dials) -> FFF:
    assert config.fff_trees is not None
    assert config.fff_depth is not None
    master = config.fff_master_width
    return FFF(
        size=config.hidden_size,
        trees=config.fff_trees,
        depth=config.fff_depth,
        linear=config.linear,
        activation=config.activation,
        norm_eps=config.linear_norm_eps,
        bias=config.fff_bias,
        master=_ffn(config, master) if master else None,
    )


# The words of the dials; a new kind of mixer is a dataclass above and a line here.
TOKEN_MIXERS: dict[str, Callable[[Dials], TokenMixer]] = {
    "mlgru": _mlgru,
    "attention": _attention,
}
CHANNEL_MIXERS: dict[str, Callable[[Dials], ChannelMixer | None]] = {
    "glu": _glu,
    "ffn": _ffn,
    "fff": _fff,
    "none": lambda config: None,
}
