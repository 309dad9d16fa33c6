"""The parts that a model is made of: frozen dataclasses whose fields are named like their tensors.

Each part says its linears and other tensors, the state that it leaves and the operations of a
token. `architecture` puts them together and gives them to all rooms.

Legend: D hidden size, M intermediate size, L layers, R rows (nodes of all trees of a layer).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from nomatmul.formats.rotary import RopeScaling

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
    """A matrix [outputs, inputs]: "ternary" (behind a quantiser of its inputs) or "dense".

    norm_eps: of the RMSNorm in front of the quantiser (a BitLinear has one), None without one.
    A tied one reads the embedding's table and has no weight of its own. scale_rows: output rows
    that share a scale of a ternary matrix, 0 for all of them. scale_group: above 0, each row has a
    scale for each group of so many inputs, which the quantiser takes apart, too; 0: inputs are
    quantised a token. rounding: where the quantiser's ties go ("away" from zero, "even", "up").
    """

    kind: str
    outputs: int
    inputs: int
    norm_eps: float | None
    tied: bool = False
    scale_rows: int = 0
    scale_group: int = 0
    rounding: str = "away"

    def tensors(self) -> dict[str, Shape]:
        """{name behind the linear's own: shape} in a training checkpoint."""
        found: dict[str, Shape] = {} if self.tied else {"weight": (self.outputs, self.inputs)}
        if self.norm_eps is not None:
            found["norm.weight"] = (self.inputs,)
        return found

    @property
    def scale_shape(self) -> Shape:
        """Of a ternary matrix' scales: [blocks of rows], or [outputs, groups]."""
        if self.scale_group:
            return self.outputs, self.inputs // self.scale_group
        return (self.outputs // self.scale_rows if self.scale_rows else 1,)


@dataclass(frozen=True)
class Embedding:
    """The table [vocabulary, size]: "dense", or "ternary" with a scale a row for each group of
    `scale_group` elements."""

    kind: str
    vocabulary: int
    size: int
    scale_group: int = 0

    @property
    def scale_shape(self) -> Shape:
        """Of a ternary table's scales."""
        return self.vocabulary, self.size // self.scale_group


_ITEM_SIZES = {"f32": 4, "f16": 2, "i8": 1}


@dataclass(frozen=True)
class Piece:
    """A named piece of a layer's state: of this shape, a sequence or, if `grows`, a position.

    dtype: of its elements, "f32", "f16" or "i8"."""

    name: str
    shape: Shape
    grows: bool = False
    dtype: str = "f32"

    @property
    def nbytes(self) -> int:
        """Bytes, of a position if it grows."""
        return _ITEM_SIZES[self.dtype] * math.prod(self.shape)


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
    """Softmax attention over all earlier positions (`causal`) or all of the sequence.

    Each head of keys and values serves heads / kv_heads heads of queries. q_norm, k_norm: on each
    head, None without them. theta: the base of rotary positions, None without them; `scaling` of
    their frequencies. A state keeps keys behind norm and rotation.
    """

    kind: ClassVar[str] = "attention"
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    theta: float | None
    scaling: RopeScaling | None

    def state(self) -> tuple[Piece, ...]:
        if not self.causal:
            return ()
        shape = (self.kv_heads, self.head_size)
        return tuple(Piece(name, shape, grows=True, dtype="f16") for name in ("k", "v"))

    def attention_products(self, length: int) -> float:
        # scores and sums; a causal token sees half of the sequence
        return 2.0 * self.heads * self.head_size * length * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class GLU(Part):
    """down(act(gate) * up); `gate_proj` holds the rows of gate, then those of up, or `up_proj` is a
    linear of its own, where each has a norm inside."""

    kind: ClassVar[str] = "glu"
    gate_proj: Linear
    down_proj: Linear
    activation: str
    up_proj: Linear | None = None

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


def linears_of(part: Part) -> Iterator[tuple[str, Linear]]:
    """(name, linear) of every linear of a part and the parts inside it, in the order of use."""
    return ((name, leaf) for name, leaf in leaves_of(part) if isinstance(leaf, Linear))


def leaves_of(part: Part, at: str = "") -> Iterator[tuple[str, Norm | Linear]]:
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{at}{field.name}"
        if isinstance(value, (Norm, Linear)):
            yield name, value
        elif isinstance(value, Part):
            yield from leaves_of(value, f"{name}.")
