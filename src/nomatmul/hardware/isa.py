"""The instruction set: each instruction as a frozen dataclass, its 128 bits, and back.

The opcode lies in bits 0..4; the fields follow upwards in the order in which the dataclass has
them, without gaps; bits behind the last one are 0. `decode(encode(i)) == i`, and every word that
`decode` takes is the one that `encode` gives. Addresses of vectors, parameters and state are in
elements and multiples of 4 (they are kept without their two low bits); a design's own
`element_lanes` may ask for more. Those of memory are in words of `memory_bits`, those of
activations in beats of `lanes`. Scalar registers are 0..31.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

INSTRUCTION_BITS = 128
OPCODE_BITS = 5
SCALARS = 32


class Epilogue(IntEnum):
    """What the row unit makes of the sums of a product."""

    STORE = 0  # dst = y
    ADD = 1  # dst = aux + y, the residual
    MLGRU = 2  # slots f, i, g: the recurrence; dst = u, dst2 = g
    GLU = 3  # slots gate, up: dst = silu(gate) * up
    LOGITS = 4  # to the host
    SILU = 5  # dst = silu(y)


@dataclass(frozen=True)
class Bits:
    """Where and how a field lies: `width` bits from bit `low`, of value / `unit`."""

    width: int
    low: int = 0
    unit: int = 1
    signed: bool = False
    least: int = 0  # the smallest value, where it is not the smallest that the bits can hold

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        if self.signed:
            return -(1 << (self.width - 1)), (1 << (self.width - 1)) - 1
        return self.least, ((1 << self.width) - 1) * self.unit


def _bits(
    width: int,
    *,
    unit: int = 1,
    signed: bool = False,
    least: int = 0,
    default: Any = dataclasses.MISSING,
) -> Any:
    bits = Bits(width, unit=unit, signed=signed, least=least)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"bits": bits})
    return dataclasses.field(default=default, metadata={"bits": bits})


def _scalar() -> Any:
    return _bits(5)


def _vector(default: Any = dataclasses.MISSING) -> Any:
    return _bits(14, unit=4, default=default)


def _flag() -> Any:
    return _bits(1, default=False)


@dataclass(frozen=True)
class Instruction:
    """Base of the instructions; `opcode` is the class's own."""

    opcode: ClassVar[int]
    name: ClassVar[str]

    def __init_subclass__(cls, opcode: int) -> None:
        cls.opcode = opcode
        cls.name = cls.__name__.upper()
        BY_OPCODE[opcode] = cls
        BY_NAME[cls.name] = cls

    def __post_init__(self) -> None:
        for name, bits in layout(type(self)).items():
            value, (least, most) = getattr(self, name), bits.range
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"{self.name}: {name} is {value!r}, not a whole number in {least}..{most}"
                )
            if value % bits.unit:
                raise ValueError(f"{self.name}: {name} is {value}, not a multiple of {bits.unit}")
        self._check()

    def _check(self) -> None:
        """What an instruction asks beyond its fields' widths."""


BY_OPCODE: dict[int, type[Instruction]] = {}
BY_NAME: dict[str, type[Instruction]] = {}


@dataclass(frozen=True)
class Halt(Instruction, opcode=0):
    """Stops until the host starts the program again."""


@dataclass(frozen=True)
class Token(Instruction, opcode=1):
    """Waits for the host's next token: its id, whether its logits are wanted, whether the state is
    fresh. Ids from `tokens` on are dropped and flagged.
    """

    tokens: int = _bits(20, least=1, default=(1 << 20) - 1)


@dataclass(frozen=True)
class Jump(Instruction, opcode=2):
    """Goes on at `target`."""

    target: int = _bits(16)


@dataclass(frozen=True)
class Skip(Instruction, opcode=3):
    """Goes on at `target` unless the token's logits are wanted."""

    target: int = _bits(16)


@dataclass(frozen=True)
class Stream(Instruction, opcode=4):
    """Starts to stream `words` memory words from `address`; later instructions take them."""

    address: int = _bits(32)
    words: int = _bits(32, least=1)


@dataclass(frozen=True)
class Embed(Instruction, opcode=5):
    """Fetches the token's record: `words` words at base + token * stride. 8 bytes of scale (m
    int32, e int32), then `rows` int8, rescaled to `fraction` and stored at `dst`. It streams the
    record itself.
    """

    base: int = _bits(32)
    stride: int = _bits(14, least=1)
    words: int = _bits(14, least=1)
    rows: int = _bits(16, least=1)
    dst: int = _vector()
    fraction: int = _bits(6, signed=True)


@dataclass(frozen=True)
class Loadp(Instruction, opcode=6):
    """Takes `count` int16 parameters out of the stream (a region of whole words) to parameter
    address `dst`.
    """

    dst: int = _vector()
    count: int = _bits(16, least=1)


@dataclass(frozen=True)
class Sconst(Instruction, opcode=7):
    """Scalar sd = m * 2^e; m is 0 (and e 0) or has 24 bits."""

    sd: int = _scalar()
    m: int = _bits(24)
    e: int = _bits(10, signed=True)

    def _check(self) -> None:
        if self.m >> 23 == 0 and (self.m or self.e):
            raise ValueError(
                f"SCONST: m is {self.m} (e {self.e}), not 0 (e 0) or {1 << 23}..{(1 << 24) - 1}"
            )


@dataclass(frozen=True)
class Smul(Instruction, opcode=8):
    """Scalar sd = sa * sb."""

    sd: int = _scalar()
    sa: int = _scalar()
    sb: int = _scalar()


@dataclass(frozen=True)
class Sadd(Instruction, opcode=9):
    """Scalar sd = sa + sb."""

    sd: int = _scalar()
    sa: int = _scalar()
    sb: int = _scalar()


@dataclass(frozen=True)
class Sdiv(Instruction, opcode=10):
    """Scalar sd = sa / sb; 0 where sb is 0."""

    sd: int = _scalar()
    sa: int = _scalar()
    sb: int = _scalar()


@dataclass(frozen=True)
class Ssqrt(Instruction, opcode=11):
    """Scalar sd = square root of sa."""

    sd: int = _scalar()
    sa: int = _scalar()


@dataclass(frozen=True)
class Scan(Instruction, opcode=12):
    """Scalar sd = largest |x * w| of `count` elements at `src`; w from parameter address `w`, or
    2^14 where `ones`.
    """

    sd: int = _scalar()
    src: int = _vector()
    count: int = _bits(16, least=1)
    w: int = _vector(0)
    ones: bool = _flag()


@dataclass(frozen=True)
class Sumsq(Instruction, opcode=13):
    """Scalar sd = sum of squares of x * w of `count` elements, of which sa is the largest."""

    sd: int = _scalar()
    src: int = _vector()
    count: int = _bits(16, least=1)
    sa: int = _scalar()
    w: int = _vector(0)
    ones: bool = _flag()


@dataclass(frozen=True)
class Quant(Instruction, opcode=14):
    """Writes `count` int8 activations of x * w from beat `dst` on; sa is the largest |x * w|, sr is
    127 / sa.
    """

    dst: int = _bits(8)
    src: int = _vector()
    count: int = _bits(16, least=1)
    sa: int = _scalar()
    sr: int = _scalar()
    w: int = _vector(0)
    ones: bool = _flag()


@dataclass(frozen=True)
class Product(Instruction, opcode=15):
    """`rows` rows in all of `slots` matrices (interleaved: f0, i0, g0, f1, ...), `beats` beats
    each, out of the stream, with the activations of slot s at beat act + s * beats; the sums
    through the row unit's `epilogue`. `m`: scalar register of slot 0's scale, the next ones for
    the others. `aux`: address of the state (mlgru) or the residual (add).
    """

    rows: int = _bits(20, least=1)
    beats: int = _bits(8, least=1)
    slots: int = _bits(2, least=1)
    act: int = _bits(8)
    epilogue: int = _bits(3)
    m: int = _scalar()
    dst: int = _vector(0)
    aux: int = _bits(18, unit=4, default=0)
    lb: int = _vector(0)
    bounded: bool = _flag()
    fraction: int = _bits(6, signed=True, default=0)
    u_shift: int = _bits(6, default=0)
    dst2: int = _vector(0)

    def _check(self) -> None:
        if self.epilogue > max(Epilogue):
            raise ValueError(f"PRODUCT: epilogue is {self.epilogue}, more than {max(Epilogue)}")
        slots = {Epilogue.MLGRU: 3, Epilogue.GLU: 2}.get(Epilogue(self.epilogue), 1)
        if self.slots != slots:
            raise ValueError(f"PRODUCT: slots is {self.slots}, and the epilogue takes {slots}")
        if self.rows % slots:
            raise ValueError(f"PRODUCT: rows is {self.rows}, not a multiple of its {slots} slots")
        if self.m + self.slots > SCALARS:
            raise ValueError(
                f"PRODUCT: m is {self.m}, more than {SCALARS - self.slots} with {self.slots} slots"
            )


@dataclass(frozen=True)
class Walk(Instruction, opcode=16):
    """Walks `trees` ternary trees of `depth` decisions: node records of `stride` words from `base`,
    `beats` beats of weights against the activations at `act`. silu of the visited rows to `dst`,
    their norm weights to parameter address `wout`.
    """

    trees: int = _bits(12, least=1)
    depth: int = _bits(5)
    base: int = _bits(32)
    stride: int = _bits(12, least=1)
    beats: int = _bits(8, least=1)
    act: int = _bits(8)
    m: int = _scalar()
    dst: int = _vector()
    wout: int = _vector()
    fraction: int = _bits(6, signed=True)


@dataclass(frozen=True)
class Combine(Instruction, opcode=17):
    """Adds the rows out of the `count` visited nodes, times their int8 at `act`: `rows` sums,
    rescaled by scalar m to `fraction`, added to the residual at `aux`, stored at `dst`.
    """

    base: int = _bits(32)
    stride: int = _bits(12, least=1)
    count: int = _bits(12, least=1)
    rows: int = _bits(16, least=1)
    act: int = _bits(8)
    m: int = _scalar()
    dst: int = _vector()
    aux: int = _vector()
    fraction: int = _bits(6, signed=True)


_LAYOUTS: dict[type[Instruction], dict[str, Bits]] = {}


def layout(kind: type[Instruction]) -> dict[str, Bits]:
    """Each field's name and bits, in order."""
    if kind not in _LAYOUTS:
        low, fields = OPCODE_BITS, {}
        for field in dataclasses.fields(kind):
            fields[field.name] = dataclasses.replace(field.metadata["bits"], low=low)
            low += fields[field.name].width
        assert low <= INSTRUCTION_BITS, f"{kind.name} takes {low} bits"
        _LAYOUTS[kind] = fields
    return _LAYOUTS[kind]


def encode(instruction: Instruction) -> int:
    """The instruction's 128 bits."""
    word = instruction.opcode
    for name, bits in layout(type(instruction)).items():
        value = int(getattr(instruction, name)) // bits.unit
        word |= (value & ((1 << bits.width) - 1)) << bits.low
    return word


def decode(word: int) -> Instruction:
    """The instruction of 128 bits; ValueError where there is none."""
    if not 0 <= word < 1 << INSTRUCTION_BITS:
        raise ValueError(f"an instruction has {INSTRUCTION_BITS} bits, not {word.bit_length()}")
    opcode = word & ((1 << OPCODE_BITS) - 1)
    if opcode not in BY_OPCODE:
        raise ValueError(f"no instruction has the opcode {opcode}, the largest is {max(BY_OPCODE)}")
    kind, values, end = BY_OPCODE[opcode], {}, OPCODE_BITS
    for field in dataclasses.fields(kind):
        bits = layout(kind)[field.name]
        value = (word >> bits.low) & ((1 << bits.width) - 1)
        if bits.signed and value >> (bits.width - 1):
            value -= 1 << bits.width
        values[field.name] = bool(value) if field.type == "bool" else value * bits.unit
        end = bits.low + bits.width
    if word >> end:
        raise ValueError(f"{kind.name}: bits behind its last field ({end}) are not 0")
    return kind(**values)
