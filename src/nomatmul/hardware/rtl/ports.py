"""What the units of the accelerator say to each other: structs of commands, streams and ports.

Every unit takes its signatures from here, so that two ends of a wire cannot disagree. A command
is the payload of a stream (`amaranth.lib.stream`: payload, valid, ready); it is taken in one
cycle and the unit keeps what it needs.

Legend of widths: E elements a group (`element_lanes`), VB bits of a vector element, W bits of a
parameter, M bits of a memory word. Addresses of memory are in words of M bits; of vectors,
parameters and state in elements; of activations in commands in beats of `lanes` elements.
Everything that an instruction can say has a fixed width; a unit uses the low bits that it has.
"""

# No `from __future__ import annotations`: data.Struct reads the shapes from the annotations.
from typing import TYPE_CHECKING

from amaranth import Shape, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

WORD_ADDRESS_BITS = 32  # of memory, in words
BURST_BITS = 16  # words of one request
ROW_BITS = 20  # rows of a product, so 1,048,575 at most
ELEMENT_BITS = 20  # addresses and counts of vector, parameter and state elements
BEAT_BITS = 12  # addresses and counts of activation beats
SCALAR_BITS = 24
EXPONENT_BITS = 10
FRACTION_BITS = 8  # signed
SHIFT_BITS = 6
MAX_SLOTS = 3


class Scalar(data.Struct):
    """The value m * 2^e: m is 0 (and e too) or has its highest bit set."""

    m: unsigned(SCALAR_BITS)
    e: signed(EXPONENT_BITS)


# -- memory ---------------------------------------------------------------------------------------


class MemoryRequest(data.Struct):
    """A burst of `length` >= 1 words from `address` on."""

    address: unsigned(WORD_ADDRESS_BITS)
    length: unsigned(BURST_BITS)


def memory_response(memory_bits: int) -> data.StructLayout:
    """One word of a burst; `error` words are zeros, `last` ends the burst."""
    return data.StructLayout({"data": unsigned(memory_bits), "error": 1, "last": 1})


def memory_word(memory_bits: int) -> data.StructLayout:
    """One word behind a reader, where bursts no longer matter."""
    return data.StructLayout({"data": unsigned(memory_bits), "error": 1})


class MemoryPort(wiring.Signature):
    """A reader's side of memory: requests out, responses in, answered in the order asked.

    Who asks has room for the whole answer: a response may be held up only for a few cycles.
    """

    def __init__(self, memory_bits: int) -> None:
        self.memory_bits = memory_bits
        super().__init__(
            {
                "request": Out(stream.Signature(MemoryRequest)),
                "response": In(stream.Signature(memory_response(memory_bits))),
            }
        )

    def __repr__(self) -> str:
        return f"MemoryPort({self.memory_bits})"


class ReadCommand(data.Struct):
    """To Streamer and RowFetcher: read `words` words from `address` on, in order."""

    address: unsigned(WORD_ADDRESS_BITS)
    words: unsigned(WORD_ADDRESS_BITS)


# -- products -------------------------------------------------------------------------------------


class ProductCommand(data.Struct):
    """`rows` rows of `beats` beats each; row r meets the activations at act + (r % slots) * beats.

    Sums come out row by row: rows counts all slots together.
    """

    rows: unsigned(ROW_BITS)
    beats: unsigned(BEAT_BITS)
    slots: unsigned(2)
    act: unsigned(BEAT_BITS)


def product_sum(sum_bits: int) -> data.StructLayout:
    """The sum of row `row` (counted from 0 over all slots); `last` is the command's last row."""
    return data.StructLayout(
        {"sum": signed(sum_bits), "slot": unsigned(2), "row": unsigned(ROW_BITS), "last": 1}
    )


class ActivationWrite(wiring.Signature):
    """Writes a group of E int8 activations; `address` counts groups (lanes / E a beat)."""

    def __init__(self, design: "Design") -> None:
        groups = design.activation_beats * design.lanes // design.element_lanes
        super().__init__(
            {
                "valid": Out(1),
                "address": Out(range(groups)),
                "data": Out(data.ArrayLayout(signed(8), design.element_lanes)),
            }
        )


# -- vector and parameter memory ------------------------------------------------------------------


def groups_of(words: int, design: "Design") -> int:
    """Groups of E elements in a memory of `words` elements."""
    return -(-words // design.element_lanes)


class GroupRead(wiring.Signature):
    """A synchronous read of a group of E elements: data two cycles after `address` and `enable`.

    Without `enable` the data stay as they were. The second register is the block RAM's own where
    the chip has one: a block RAM answers late in a cycle.
    """

    def __init__(self, groups: int, element: Shape, lanes: int) -> None:
        super().__init__(
            {
                "enable": Out(1, init=1),
                "address": Out(range(groups)),
                "data": In(data.ArrayLayout(element, lanes)),
            }
        )


class ElementWrite(wiring.Signature):
    """Writes one element; `address` counts elements."""

    def __init__(self, words: int, element: Shape) -> None:
        super().__init__({"valid": Out(1), "address": Out(range(words)), "data": Out(element)})


class GroupWrite(wiring.Signature):
    """Writes those elements of a group whose bit of `mask` is set; `address` counts groups."""

    def __init__(self, groups: int, element: Shape, lanes: int) -> None:
        super().__init__(
            {
                "valid": Out(1),
                "address": Out(range(groups)),
                "mask": Out(lanes),
                "data": Out(data.ArrayLayout(element, lanes)),
            }
        )


def vector_read(design: "Design") -> GroupRead:
    return GroupRead(
        groups_of(design.vector_words, design), signed(design.vector_bits), design.element_lanes
    )


def vector_write(design: "Design") -> ElementWrite:
    return ElementWrite(design.vector_words, signed(design.vector_bits))


def parameter_read(design: "Design") -> GroupRead:
    return GroupRead(
        groups_of(design.parameter_words, design), signed(design.weight_bits), design.element_lanes
    )


def parameter_write(design: "Design") -> GroupWrite:
    return GroupWrite(
        groups_of(design.parameter_words, design), signed(design.weight_bits), design.element_lanes
    )


# -- vector and scalar units ----------------------------------------------------------------------


class VectorOp(enum.Enum, shape=2):
    SCAN = 0
    SUMSQ = 1
    QUANT = 2


class VectorCommand(data.Struct):
    """`count` elements of x at `src`, W at `w` (all 2^14 where `ones`); see docs on numerics."""

    op: VectorOp
    src: unsigned(ELEMENT_BITS)
    w: unsigned(ELEMENT_BITS)
    ones: unsigned(1)
    count: unsigned(ELEMENT_BITS)
    a: Scalar
    r: Scalar
    dst: unsigned(BEAT_BITS)


class ScalarOp(enum.Enum, shape=2):
    MUL = 0
    ADD = 1
    DIV = 2
    SQRT = 3


class ScalarCommand(data.Struct):
    op: ScalarOp
    a: Scalar
    b: Scalar


class ScalarResult(data.Struct):
    """`flag`: the exponent left -512..511 and was clamped."""

    m: unsigned(SCALAR_BITS)
    e: signed(EXPONENT_BITS)
    flag: unsigned(1)


# -- rows -----------------------------------------------------------------------------------------


class Epilogue(enum.Enum, shape=3):
    """What the row unit does with a rescaled sum."""

    STORE = 0
    ADD = 1
    MLGRU = 2
    GLU = 3
    LOGITS = 4
    SILU = 5


class RowCommand(data.Struct):
    """`rows` sums (all slots together), slot s rescaled by scalars[s]."""

    epilogue: Epilogue
    rows: unsigned(ROW_BITS)
    slots: unsigned(2)
    scalars: data.ArrayLayout(Scalar, MAX_SLOTS)
    fraction: signed(FRACTION_BITS)
    u_shift: unsigned(SHIFT_BITS)
    dst: unsigned(ELEMENT_BITS)
    dst2: unsigned(ELEMENT_BITS)
    aux: unsigned(ELEMENT_BITS)
    lb: unsigned(ELEMENT_BITS)
    bounded: unsigned(1)
    fresh: unsigned(1)


def logit(design: "Design") -> data.StructLayout:
    return data.StructLayout({"value": signed(design.vector_bits), "last": 1})


def argmax(design: "Design") -> data.StructLayout:
    return data.StructLayout({"index": unsigned(ROW_BITS), "value": signed(design.vector_bits)})


# -- trees ----------------------------------------------------------------------------------------


class WalkCommand(data.Struct):
    """Walk `trees` trees of `depth` decisions; node records are `stride` words from `base` on."""

    trees: unsigned(ROW_BITS)
    depth: unsigned(5)
    base: unsigned(WORD_ADDRESS_BITS)
    stride: unsigned(BURST_BITS)
    beats: unsigned(BEAT_BITS)
    act: unsigned(BEAT_BITS)
    m: Scalar
    fraction: signed(FRACTION_BITS)
    dst: unsigned(ELEMENT_BITS)
    wout: unsigned(ELEMENT_BITS)


class CombineCommand(data.Struct):
    """Add up the `count` visited records of w_out, `rows` outputs of `beats` beats a record."""

    base: unsigned(WORD_ADDRESS_BITS)
    stride: unsigned(BURST_BITS)
    count: unsigned(ROW_BITS)
    rows: unsigned(ROW_BITS)
    beats: unsigned(BEAT_BITS)
    act: unsigned(BEAT_BITS)
    m: Scalar
    fraction: signed(FRACTION_BITS)
    dst: unsigned(ELEMENT_BITS)
    aux: unsigned(ELEMENT_BITS)
