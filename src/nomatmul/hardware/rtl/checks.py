"""What an instruction may not say in this design: it is asked before anything is dispatched.

Every address range of an instruction must lie within its memory, begin at a whole group of E
elements, and hold something. One range is checked a cycle, in three steps with registers between:
base * slots, + span, > limit * slots. (A product of several slots writes rows / slots elements;
multiplying both sides spares the division.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_

from amaranth import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.pipeline import register

_BITS = 24  # of a range's end: an address of 20 bits times 3 slots, plus 20 bits of rows
_LATENCY = 5  # cycles from the choice of a range to its answer


def field(word: Value, kind: type[isa.Instruction], name: str) -> Value:
    """A field of the instruction word, in its own unit and with its sign."""
    bits = isa.layout(kind)[name]
    value = word[bits.low : bits.low + bits.width]
    if bits.unit > 1:
        value = Cat(Const(0, (bits.unit - 1).bit_length()), value)
    return value.as_signed() if bits.signed else value


@dataclass
class _Range:
    """`span` elements from `base`, within `limit`; asked only where `enable`."""

    base: Value
    span: Value
    limit: Value | int
    enable: Value
    grouped: bool = True
    by_slots: bool = False


def _simple(design: Design, word: Value) -> Iterator[tuple[type[isa.Instruction], _Range]]:
    vectors, parameters = design.vector_words, design.parameter_words
    always = Const(1)

    def of(kind: type[isa.Instruction], base: str, span: str, limit: int, enable: Value = always):
        return kind, _Range(field(word, kind, base), field(word, kind, span), limit, enable)

    yield of(isa.Embed, "dst", "rows", vectors)
    yield of(isa.Loadp, "dst", "count", parameters)
    for kind in (isa.Scan, isa.Sumsq, isa.Quant):
        yield of(kind, "src", "count", vectors)
        yield of(kind, "w", "count", parameters, ~field(word, kind, "ones"))
    yield isa.Quant, _elements(design, word, isa.Quant, "dst")
    if design.trees:
        yield of(isa.Combine, "dst", "rows", vectors)
        yield of(isa.Combine, "aux", "rows", vectors)
        yield isa.Combine, _elements(design, word, isa.Combine, "act")
        act, beats = (field(word, isa.Walk, name) for name in ("act", "beats"))
        yield isa.Walk, _Range(act, beats, design.activation_beats, always, grouped=False)


def _elements(design: Design, word: Value, kind: type[isa.Instruction], name: str) -> _Range:
    """`count` activations from a beat on."""
    base = field(word, kind, name) * design.lanes
    span = field(word, kind, "count")
    return _Range(base, span, design.activation_beats * design.lanes, Const(1), grouped=False)


def _product(design: Design, word: Value) -> list[_Range]:
    get = {name: field(word, isa.Product, name) for name in isa.layout(isa.Product)}
    rows, vectors, slots = get["rows"], design.vector_words, get["slots"]
    mlgru = get["epilogue"] == isa.Epilogue.MLGRU
    residual = get["epilogue"] == isa.Epilogue.ADD
    to_host = get["epilogue"] == isa.Epilogue.LOGITS
    aux_limit = Mux(mlgru, Const(design.state_words, _BITS), Const(vectors, _BITS))
    beats = Mux(slots[1], get["beats"] << 1, 0) + Mux(slots[0], get["beats"], 0)
    bounded = mlgru & get["bounded"]
    return [
        _Range(get["act"], beats, design.activation_beats, Const(1), grouped=False),
        _Range(get["dst"], rows, vectors, ~to_host, by_slots=True),
        _Range(get["dst2"], rows, vectors, mlgru, by_slots=True),
        _Range(get["aux"], rows, aux_limit, mlgru | residual, by_slots=True),
        _Range(get["lb"], rows, design.parameter_words, bounded, by_slots=True),
    ]


def _known(design: Design, word: Value) -> list[Value]:
    """What must hold for the opcode and the small fields to be ones that exist."""
    trees = (isa.Walk.opcode, isa.Combine.opcode)
    opcode = word[: isa.OPCODE_BITS]
    kinds = [code for code in isa.BY_OPCODE if design.trees or code not in trees]
    epilogue, slots = (field(word, isa.Product, name) for name in ("epilogue", "slots"))
    forms = Const(0)
    for each in isa.Epilogue:
        wanted = {isa.Epilogue.MLGRU: 3, isa.Epilogue.GLU: 2}.get(each, 1)
        forms |= (epilogue == each) & (slots == wanted)
    target = field(word, isa.Jump, "target")
    jump = (opcode == isa.Jump.opcode) | (opcode == isa.Skip.opcode)
    product = opcode == isa.Product.opcode
    stream = opcode == isa.Stream.opcode
    some = field(word, isa.Stream, "words") != 0
    there = target < design.program_words
    return [opcode.matches(*kinds), ~product | forms, ~jump | there, ~stream | some]


class Checker(wiring.Component):
    """`start` pulses when `word` is there to stay; `done` pulses with `bad` beside it."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "start": In(1),
                "word": In(isa.INSTRUCTION_BITS),
                "done": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        ranges: dict[int, list[_Range]] = {
            isa.Product.opcode: _product(self.design, self.word),
        }
        for kind, found in _simple(self.design, self.word):
            ranges.setdefault(kind.opcode, []).append(found)
        most = max(len(found) for found in ranges.values())
        step, last = Signal(range(most + 1)), Signal(range(most + 1))
        running, ending, known, out = Signal(), Signal(_LATENCY), Signal(), Signal()
        m.d.comb += [self.done.eq(ending[-1]), self.bad.eq(out | ~known)]
        bad = self._compare(m, self._choose(m, ranges, running, step, last))
        m.d.sync += [
            ending.eq(ending << 1),
            known.eq(
                Cat(register(m, fact, "fact") for fact in _known(self.design, self.word)).all()
            ),
        ]
        with m.If(running):
            m.d.sync += step.eq(step + 1)
            with m.If(~self.word[: isa.OPCODE_BITS].matches(*ranges)):  # none to wait for
                m.d.sync += [running.eq(0), ending[-1].eq(1)]
            with m.Elif(step == last):
                m.d.sync += [running.eq(0), ending[0].eq(1)]
        with m.If(bad):
            m.d.sync += out.eq(1)
        with m.If(self.start):
            m.d.sync += [running.eq(1), step.eq(0), out.eq(0)]
        return m

    def _choose(
        self, m: Module, ranges: dict[int, list[_Range]], running: Value, step: Value, last: Value
    ) -> tuple[Signal, ...]:
        """The range of this step, two cycles later: base, span, limit, times, enable, odd base."""
        base, span, limit = (Signal(_BITS, name=f"chosen{k}", reset_less=True) for k in range(3))
        times, enable, odd = Signal(2), Signal(), Signal()
        slots = field(self.word, isa.Product, "slots")
        group = (self.design.element_lanes - 1).bit_length()
        known = [
            (opcode, k, each) for opcode, found in ranges.items() for k, each in enumerate(found)
        ]
        chosen = Signal(len(known))  # one bit at most
        for n, (opcode, k, _) in enumerate(known):
            here = (self.word[: isa.OPCODE_BITS] == opcode) & (step == k)
            m.d.sync += chosen[n].eq(here & running)
        with m.Switch(self.word[: isa.OPCODE_BITS]):
            for opcode, found in ranges.items():
                with m.Case(opcode):
                    m.d.comb += last.eq(len(found) - 1)

        def kept(value: Value | int) -> Value:
            """A function of the word, in a register: the word stays."""
            if isinstance(value, int):
                return Const(value, _BITS)
            register = Signal(len(value), reset_less=True, name=f"word_{len(chosen)}")
            m.d.sync += register.eq(value)
            return register

        def pick(values: list[Value]) -> Value:
            """The value of the chosen range."""
            masked = [Mux(bit, value, 0) for bit, value in zip(chosen, values, strict=True)]
            return reduce(or_, masked)

        every = [each for _, _, each in known]
        starts = [each.base if each.grouped else kept(each.base) for each in every]
        odds = [s[:group].any() if e.grouped else 0 for s, e in zip(starts, every, strict=True)]
        m.d.sync += [
            base.eq(pick(starts)),
            span.eq(pick([each.span if each.grouped else kept(each.span) for each in every])),
            limit.eq(pick([kept(each.limit) for each in every])),
            times.eq(pick([slots if each.by_slots else Const(1) for each in every])),
            enable.eq(pick([kept(each.enable) for each in every])),
            odd.eq(pick(odds)),
        ]
        return base, span, limit, times, enable, odd

    def _compare(self, m: Module, chosen: tuple[Signal, ...]) -> Value:
        """Whether the range chosen three cycles ago is not within its limit."""
        base, span, limit, times, enable, odd = chosen
        base_2, limit_2, span_2, end, limit_3 = (
            Signal(_BITS, name=f"compared{k}", reset_less=True) for k in range(5)
        )
        enable_2, enable_3, lame_2, lame_3 = (Signal(name=f"check_{k}") for k in range(4))

        def multiple(value: Value) -> Value:
            return Mux(times[1], value << 1, 0) + Mux(times[0], value, 0)

        m.d.sync += [
            base_2.eq(multiple(base)),
            limit_2.eq(multiple(limit)),
            span_2.eq(span),
            enable_2.eq(enable),
            lame_2.eq(odd | (span == 0)),
            end.eq(base_2 + span_2),
            limit_3.eq(limit_2),
            enable_3.eq(enable_2),
            lame_3.eq(lame_2),
        ]
        return enable_3 & (lame_3 | (end > limit_3))
