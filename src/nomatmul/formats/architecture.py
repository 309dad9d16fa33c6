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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from nomatmul.formats.dials import Dials

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: "rms", or "layer" with its bias."""

    kind: str
    size: int
    eps: float

    def tensors(self) -> dict[str, Shape]:
        """{name behind the norm's own: shape}."""
        names = ("weight", "bias") if self.kind == "layer" else ("weight",)
        return dict.fromkeys(names, (self.size,))


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs]: "ternary" (a BitLinear, with the RMSNorm in front of its int8
    quantiser) or "dense". A tied one reads the embedding's table and has no weight of its own."""

    kind: str
    outputs: int
    inputs: int
    norm_eps: float
    tied: bool = False

    def tensors(self) -> dict[str, Shape]:
        """{name behind the linear's own: shape} in a training checkpoint."""
        found: dict[str, Shape] = {} if self.tied else {"weight": (self.outputs, self.inputs)}
        if self.kind == "ternary":
            found["norm.weight"] = (self.inputs,)
        return found


@dataclass(frozen=True)
class Piece:
    """A named piece of a layer's state: float32 of this shape, a sequence or, if `grows`, a
    position."""

    name: str
    shape: Shape
    grows: bool = False


@dataclass(frozen=True)
class Part:
    """What mixers have in common: fields that are linears, norms or parts, and tensors besides."""

    kind: ClassVar[str]

    def own_tensors(self) -> dict[str, Shape]:
        """Tensors that belong to no linear or norm."""
        return {}

    def state(self) -> tuple[Piece, ...]:
        """What a sequence leaves behind in this part."""
        return ()

    def attention_products(self, length: int) -> float:
        """Multiply-adds of a token beside those of the linears, in a sequence of `length`."""
        return 0.0

    def active_products(self, *, masked: bool = False) -> float:
        """Multiply-adds of a token with weights. masked: of the form that computes every node."""
        return float(sum(linear.outputs * linear.inputs for _, linear in linears_of(self)))


@dataclass(frozen=True)
class MLGRU(Part):
    """The element-wise recurrence of arXiv 2406.02528; `bounded`: its forget gate has a learned
    lower bound, a row of the model's table `lower_bounds` [L, D]."""

    kind: ClassVar[str] = "mlgru"
    i_proj: Linear
    f_proj: Linear
    g_proj: Linear
    o_proj: Linear
    g_norm: Norm
    bounded: bool

    def state(self) -> tuple[Piece, ...]:
        return (Piece("h", (self.i_proj.outputs,)),)


@dataclass(frozen=True)
class Attention(Part):
    """Softmax attention over all earlier positions (`causal`) or all of the sequence; `theta` is
    the base of rotary positions, None without them."""

    kind: ClassVar[str] = "attention"
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    heads: int
    head_size: int
    causal: bool
    theta: float | None

    def state(self) -> tuple[Piece, ...]:
        if not self.causal:
            return ()
        shape = (self.heads, self.head_size)
        return Piece("k", shape, grows=True), Piece("v", shape, grows=True)

    def attention_products(self, length: int) -> float:
        # scores and sums; a causal token sees half of the sequence
        return 2.0 * self.heads * self.head_size * length * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class GLU(Part):
    """down(act(gate) * up); `gate_proj` holds the rows of gate, then those of up."""

    kind: ClassVar[str] = "glu"
    gate_proj: Linear
    down_proj: Linear
    activation: str

    @property
    def neurons(self) -> int:
        """Of a token."""
        return self.down_proj.inputs


@dataclass(frozen=True)
class FFN(Part):
    """down(act(up))."""

    kind: ClassVar[str] = "ffn"
    up_proj: Linear
    down_proj: Linear
    activation: str

    @property
    def neurons(self) -> int:
        """Of a token."""
        return self.down_proj.inputs


@dataclass(frozen=True)
class FFF(Part):
    """Trees of neurons (arXiv 2311.10770); `master` stands beside them for every token.

    Row t * n + j is node j of tree t (n nodes a tree); its children are 2j + 1 and 2j + 2.
    """

    kind: ClassVar[str] = "fff"
    size: int
    trees: int
    depth: int
    linear: str
    activation: str
    norm_eps: float
    bias: bool
    master: FFN | None

    @property
    def nodes(self) -> int:
        """Nodes of one tree: 2^(depth+1) - 1."""
        return (2 << self.depth) - 1

    @property
    def rows(self) -> int:
        """Nodes of all trees."""
        return self.trees * self.nodes

    @property
    def active_rows(self) -> int:
        """Rows that a token visits."""
        return self.trees * (self.depth + 1)

    @property
    def neurons(self) -> int:
        """Of a token, the master leaf's included."""
        return self.active_rows + (self.master.neurons if self.master is not None else 0)

    def own_tensors(self) -> dict[str, Shape]:
        size, rows = self.size, self.rows
        shapes: dict[str, Shape] = {"w_in": (rows, size), "w_out": (rows, size)}
        if self.bias:
            shapes["bias"] = (rows,)
        if self.linear == "ternary":
            shapes |= {"norm_in.weight": (size,), "norm_out.weight": (rows,)}
        return shapes

    def active_products(self, *, masked: bool = False) -> float:
        neurons = self.rows if masked else self.active_rows
        master = self.master.active_products() if self.master is not None else 0.0
        return 2.0 * self.size * neurons + master


TokenMixer = MLGRU | Attention
ChannelMixer = GLU | FFN | FFF


@dataclass(frozen=True)
class Block(Part):
    """A token mixer and, where `channel` is not None, a channel mixer, each behind a norm."""

    kind: ClassVar[str] = "block"
    mixer_norm: Norm
    mixer: TokenMixer
    channel_norm: Norm | None
    channel: ChannelMixer | None


@dataclass(frozen=True)
class Architecture:
    """All parts of a model. `sinusoidal`: positions are added to the embedding, with one learned
    scale (crammed BERT)."""

    vocabulary: int
    size: int
    sinusoidal: bool
    embedding_norm: Norm | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Linear

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
            for name, leaf in _leaves(block):
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
    def bounded(self) -> bool:
        """Whether the model owns the table `lower_bounds` [L, D]."""
        return any(isinstance(b.mixer, MLGRU) and b.mixer.bounded for b in self.blocks)

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


def linears_of(part: Part) -> Iterator[tuple[str, Linear]]:
    """(name, linear) of every linear of a part and the parts inside it, in the order of use."""
    return ((name, leaf) for name, leaf in _leaves(part) if isinstance(leaf, Linear))


def _leaves(part: Part, at: str = "") -> Iterator[tuple[str, Norm | Linear]]:
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{at}{field.name}"
        if isinstance(value, (Norm, Linear)):
            yield name, value
        elif isinstance(value, Part):
            yield from _leaves(value, f"{name}.")


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
        vocabulary=config.vocab_size,
        size=size,
        sinusoidal=config.positions == "sinusoidal",
        embedding_norm=Norm(config.norm, size, eps) if config.embedding_norm else None,
        blocks=tuple(_block(config, layer) for layer in range(config.num_layers)),
        final_norm=Norm(config.norm, size, eps),
        head=dataclasses.replace(
            _linear(config, config.vocab_size, size), tied=config.tie_embeddings
        ),
    )


def _linear(config: Dials, outputs: int, inputs: int) -> Linear:
    return Linear(config.linear, outputs, inputs, config.linear_norm_eps)


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
    square = _linear(config, config.hidden_size, config.hidden_size)
    theta = config.rope_theta if config.positions == "rotary" else None
    sizes = config.num_heads, config.head_size
    return Attention(square, square, square, square, *sizes, config.causal, theta)


def _glu(config: Dials) -> GLU:
    size, inner = config.hidden_size, config.mlp_size
    gate, down = _linear(config, 2 * inner, size), _linear(config, size, inner)
    return GLU(gate, down, config.glu_activation)


def _ffn(config: Dials, inner: int | None = None) -> FFN:
    size, inner = config.hidden_size, config.mlp_size if inner is None else inner
    return FFN(_linear(config, inner, size), _linear(config, size, inner), config.activation)


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
