"""What each unit is told by an instruction: the commands' shapes, and their values out of its word.

Values are wires of the instruction's and the operands' registers, with at most one choice of two
between: units keep what they need when they take a command.
"""

from dataclasses import dataclass

from amaranth import Module, Mux, Shape, Value, unsigned
from amaranth.lib import data

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.checks import field

COUNT_BITS = 32  # outputs of a gearbox's region


class LoadCommand(data.Struct):
    """To the loader: `count` int16 to parameter address `dst`, or a scale and `count` int8."""

    embed: unsigned(1)
    dst: unsigned(ports.ELEMENT_BITS)
    count: unsigned(ports.ELEMENT_BITS)


def of(design: Design) -> dict[str, Shape]:
    """The commands that the sequencer gives, by name; `weights` counts beats of a region."""
    shapes = {
        "read": ports.ReadCommand,
        "weights": unsigned(COUNT_BITS),
        "product": ports.ProductCommand,
        "row": ports.RowCommand,
        "vector": ports.VectorCommand,
        "scalar": ports.ScalarCommand,
        "load": LoadCommand,
    }
    if design.trees:
        shapes |= {"walk": ports.WalkCommand, "combine": ports.CombineCommand}
    return shapes


# Which commands an opcode gives. EMBED's `row` follows when the record's scale is known.
GIVEN: dict[type[isa.Instruction], tuple[str, ...]] = {
    isa.Stream: ("read",),
    isa.Embed: ("read", "load"),
    isa.Loadp: ("load",),
    isa.Smul: ("scalar",),
    isa.Sadd: ("scalar",),
    isa.Sdiv: ("scalar",),
    isa.Ssqrt: ("scalar",),
    isa.Scan: ("vector",),
    isa.Sumsq: ("vector",),
    isa.Quant: ("vector",),
    isa.Product: ("weights", "product", "row"),
    isa.Walk: ("walk",),
    isa.Combine: ("combine",),
}
SCALAR_KINDS = (isa.Smul, isa.Sadd, isa.Sdiv, isa.Ssqrt)
VECTOR_KINDS = (isa.Scan, isa.Sumsq, isa.Quant)


@dataclass(frozen=True)
class Sources:
    """Where values come from: `word`; whether it is an EMBED; three scalars; whether the state is
    fresh; a `product` (rows * beats, or token * stride), an `address` (base + product), and a
    record's beats.
    """

    word: Value
    embeds: Value
    operands: list
    fresh: Value
    product: Value
    address: Value
    beats: Value


def is_a(word: Value, *kinds: type[isa.Instruction]) -> Value:
    """Whether the word's opcode is one of these."""
    return word[: isa.OPCODE_BITS].matches(*(kind.opcode for kind in kinds))


def connect(m: Module, outputs: dict[str, Value], sources: Sources) -> None:
    """Drive each command's payload."""
    word = sources.word
    embeds = sources.embeds
    kinds = {"product": isa.Product, "walk": isa.Walk, "combine": isa.Combine}
    for name, kind in kinds.items():
        if name in outputs:
            _same_names(m, outputs[name], kind, word)
    m.d.comb += [
        outputs["read"].address.eq(
            Mux(embeds, sources.address, field(word, isa.Stream, "address"))
        ),
        outputs["read"].words.eq(
            Mux(embeds, field(word, isa.Embed, "words"), field(word, isa.Stream, "words"))
        ),
        outputs["weights"].eq(sources.product),
        outputs["load"].embed.eq(embeds),
        outputs["load"].dst.eq(field(word, isa.Loadp, "dst")),
        outputs["load"].count.eq(
            Mux(embeds, field(word, isa.Embed, "rows"), field(word, isa.Loadp, "count"))
        ),
    ]
    for name in ("walk", "combine"):
        if name in outputs:
            m.d.comb += outputs[name].m.eq(sources.operands[0])
    if "combine" in outputs:
        m.d.comb += outputs["combine"].beats.eq(sources.beats)
    _row(m, outputs["row"], sources, embeds)
    _vector(m, outputs["vector"], sources)
    _scalar(m, outputs["scalar"], sources)


def _same_names(m: Module, output: Value, kind: type[isa.Instruction], word: Value) -> None:
    """Connect the fields that instruction and command call alike; `m` is a register's number."""
    members = {name for name, _ in data.Layout.cast(output.shape())}
    for name in isa.layout(kind):
        if name != "m" and name in members:
            m.d.comb += output[name].eq(field(word, kind, name))


def _row(m: Module, output: Value, sources: Sources, embeds: Value) -> None:
    word = sources.word
    _same_names(m, output, isa.Product, word)
    m.d.comb += output.fresh.eq(sources.fresh)
    for scalar, operand in zip(output.scalars, sources.operands, strict=True):
        m.d.comb += scalar.eq(operand)
    with m.If(embeds):
        _same_names(m, output, isa.Embed, word)
        m.d.comb += [output.epilogue.eq(ports.Epilogue.STORE), output.slots.eq(1)]


def _vector(m: Module, output: Value, sources: Sources) -> None:
    word = sources.word
    m.d.comb += [output.a.eq(sources.operands[0]), output.r.eq(sources.operands[1])]
    ops = ports.VectorOp.SCAN, ports.VectorOp.SUMSQ, ports.VectorOp.QUANT
    with m.Switch(word[: isa.OPCODE_BITS]):
        for op, kind in zip(ops, VECTOR_KINDS, strict=True):
            with m.Case(kind.opcode):
                m.d.comb += output.op.eq(op)
                _same_names(m, output, kind, word)


def _scalar(m: Module, output: Value, sources: Sources) -> None:
    ops = ports.ScalarOp.MUL, ports.ScalarOp.ADD, ports.ScalarOp.DIV, ports.ScalarOp.SQRT
    m.d.comb += [output.a.eq(sources.operands[0]), output.b.eq(sources.operands[1])]
    with m.Switch(sources.word[: isa.OPCODE_BITS]):
        for op, kind in zip(ops, SCALAR_KINDS, strict=True):
            with m.Case(kind.opcode):
                m.d.comb += output.op.eq(op)
