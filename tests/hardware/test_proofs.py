"""Proofs by SAT of the memory path: for ever where `depth` stands with induction, else bounded.

Small sizes stand for all: the units' logic is the same for any width and depth. What a proof
watches: the numbers of two moments that the solver chooses, so that order, loss and doubling of
any beat show.
"""

from __future__ import annotations

from typing import Any

from amaranth import Elaboratable, Module, Mux, Signal
from amaranth.hdl import Assert, Assume
from hardware import formal

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.arbiter import Arbiter
from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.gearbox import Gearbox
from nomatmul.hardware.rtl.pipeline import Skid, delay
from nomatmul.hardware.rtl.products import SumQueue
from nomatmul.hardware.rtl.streamer import Streamer


class Spec(Elaboratable):
    """A module made by a function."""

    def __init__(self, build: Any) -> None:
        self.build = build

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self.build(m)
        return m


def fifo_spec(depth: int, fault: str = "") -> Spec:
    """Beats carry their number modulo 2^4, and must come out so."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = Fifo(4, depth)
        m.d.comb += [
            dut.input.valid.eq(formal.free(m, 1)),
            dut.output.ready.eq(formal.free(m, 1)),
        ]
        sent, got = Signal(4), Signal(4)
        inside = Signal(4)
        m.d.comb += [dut.input.payload.eq(sent), inside.eq(sent - got)]
        m.d.sync += [
            sent.eq(sent + (dut.input.valid & dut.input.ready)),
            got.eq(got + (dut.output.valid & dut.output.ready)),
        ]
        if fault == "lost":
            m.d.sync += sent.eq(sent + dut.input.valid)
        formal.assert_stream(m, dut.output)
        with m.If(dut.output.valid):
            m.d.comb += Assert(dut.output.payload == got)
        m.d.comb += [Assert(dut.level == inside), Assert(inside <= depth + 2)]

    return Spec(build)


def test_fifo_loses_and_doubles_nothing() -> None:
    formal.prove(fifo_spec(2), depth=11, induction=False)
    holds, _ = formal.answer(fifo_spec(2, "lost"), depth=11, induction=False)
    assert not holds


def holds_level(fifo: Fifo) -> list[Any]:
    """The level is the sum of the parts, and every copy of a register is equal to it."""
    copies = [Assert(fetched == fifo.fetched) for fetched, _ in fifo.parts]
    copies += [Assert(valid == fifo.output.valid) for _, valid in fifo.parts]
    return [Assert(fifo.level == fifo.stored + fifo.fetched + fifo.output.valid), *copies]


def test_fifo_holds_what_its_level_says_for_ever() -> None:
    def build(m: Module) -> None:
        m.submodules.dut = dut = Fifo(2, 8)
        m.d.comb += [
            dut.input.valid.eq(formal.free(m, 1)),
            dut.input.payload.eq(formal.free(m, 2)),
            dut.output.ready.eq(formal.free(m, 1)),
            *holds_level(dut),
            Assert(dut.stored <= 8),
            Assert(dut.input.ready | (dut.level >= 8)),
        ]
        formal.assert_stream(m, dut.output)

    formal.prove(Spec(build), depth=4)


def small(**sizes: Any) -> Design:
    return Design(**{"lanes": 32, "element_lanes": 4, "memory_bits": 16, **sizes})


def arbiter_spec(claims: Any) -> Spec:
    """Three readers that ask for anything at any time, a memory that takes when it likes."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = Arbiter(small(), 3, outstanding=4)
        for k, reader in enumerate(dut.readers):
            formal.assume_stream(m, reader.request, f"reader_{k}")
            m.d.comb += reader.response.ready.eq(formal.free(m, 1))
        m.d.comb += dut.memory.request.ready.eq(formal.free(m, 1))
        formal.assume_stream(m, dut.memory.response, "answer")
        claims(m, dut)

    return Spec(build)


def test_arbiter_serves_one_at_a_time_and_all_in_turn_for_ever() -> None:
    def claims(m: Module, dut: Arbiter) -> None:
        formal.assert_stream(m, dut.memory.request)
        takes = [reader.request.valid & reader.request.ready for reader in dut.readers]
        m.d.comb += Assert(takes[0] + takes[1] + takes[2] <= 1)
        # how often the others were served while reader 0 waited: each at most once
        others, waits = Signal(2), dut.readers[0].request.valid & ~takes[0]
        with m.If(waits & (takes[1] | takes[2])):
            m.d.sync += others.eq(others + 1)
        with m.Elif(~waits):
            m.d.sync += others.eq(0)
        # after reader 1 the turn is 2 or 0; after reader 2 it is 0
        m.d.comb += [Assert(dut.turn < 3), Assert(others <= 2)]
        m.d.comb += Assert((others == 0) | (dut.turn == 0) | ((others == 1) & (dut.turn == 2)))

    formal.prove(arbiter_spec(claims), depth=6)


@formal.depths(11, 14)
def test_arbiter_gives_whole_answers_to_who_asked(depth: int) -> None:
    def claims(m: Module, dut: Arbiter) -> None:
        asked, answered, due = Signal(4), Signal(4), Signal(4)
        watched, owner = formal.watched(m, 4), Signal(2)
        takes = [reader.request.valid & reader.request.ready for reader in dut.readers]
        answer = dut.memory.response
        ends = answer.valid & answer.ready & answer.payload.last
        m.d.comb += due.eq(asked - answered)
        m.d.sync += [
            asked.eq(asked + (takes[0] | takes[1] | takes[2])),
            answered.eq(answered + ends),
        ]
        m.d.comb += Assume(~answer.valid | (due != 0))  # memory answers what it was asked
        for k in range(3):
            with m.If(takes[k] & (asked == watched)):
                m.d.sync += owner.eq(k)
            with m.If(answered == watched):
                m.d.comb += Assert(~dut.readers[k].response.valid | (owner == k))
            with m.If((answered == watched) & (owner == k)):
                # nothing is held up but by the reader itself
                m.d.comb += Assert(~answer.valid | (answer.ready == dut.readers[k].response.ready))

    formal.prove(arbiter_spec(claims), depth=depth, induction=False)


def streamer_spec(claims: Any, *, trusted: bool = True, burst: int = 2) -> Spec:
    """A memory that answers as many words as it was asked for, and a taker, when they like."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = Streamer(small(burst=burst, fifo_words=2 * burst))
        formal.assume_stream(m, dut.command, "command")
        m.d.comb += [
            dut.memory.request.ready.eq(formal.free(m, 1)),
            dut.words.ready.eq(formal.free(m, 1)),
        ]
        answer, request = dut.memory.response, dut.memory.request
        formal.assume_stream(m, answer, "answer")
        due = Signal(8)  # words asked for and not answered
        more = Signal(8)
        m.d.comb += more.eq(
            (request.payload.length & (request.valid & request.ready).replicate(16))[:8]
        )
        m.d.sync += due.eq(due + more - (answer.valid & answer.ready))
        if trusted:
            m.d.comb += Assume(~answer.valid | (due != 0))
        claims(m, dut, due)

    return Spec(build)


def never_full(m: Module, dut: Streamer, due: Signal) -> None:
    """An answer always finds room; credits are what is neither due nor inside."""
    request, fifo = dut.memory.request, dut.fifo
    asked = Signal(8)  # put out and not taken by memory
    m.d.comb += asked.eq((request.payload.length & request.valid.replicate(16))[:8])
    formal.assert_stream(m, request, "request")
    formal.assert_stream(m, dut.words, "words")
    m.d.comb += [
        Assert(~dut.memory.response.valid | dut.memory.response.ready),
        Assert(dut.credits + dut.taken + due + asked + fifo.level == dut.depth + dut.cost),
        Assert((dut.credits <= dut.depth) & (dut.cost <= dut.credits)),
        Assert((dut.cost == 0) | ~(dut.compared | dut.measured)),
        *holds_level(fifo),
        Assert(due <= dut.depth),
        Assert(~request.valid | ((request.payload.length >= 1) & (request.payload.length <= 2))),
        Assert((dut.left != 0) | ~dut.asking),
        *holds_measure(dut),
    ]
    with m.If(dut.measured):
        m.d.comb += [
            Assert((dut.length >= 1) & (dut.length <= 2) & (dut.length <= dut.left)),
            Assert(dut.final == (dut.length == dut.left)),
        ]


def holds_measure(dut: Streamer) -> list[Any]:
    """Of the two steps in front of a burst: one at a time, and what the first one found."""
    inside, low = dut.inside, (dut.burst - 1).bit_length()
    return [
        Assert(dut.asking | ~(dut.compared | dut.measured)),
        Assert(~(dut.compared & dut.measured)),
        Assert(~dut.compared | (inside == dut.burst - dut.address[:low])),
        Assert(~dut.compared | (dut.final == (dut.left <= inside))),
    ]


def test_an_answer_never_meets_a_full_fifo_for_ever() -> None:
    formal.prove(streamer_spec(never_full), depth=4)
    holds, _ = formal.answer(streamer_spec(never_full, trusted=False), depth=8, induction=False)
    assert not holds


def asks_once(m: Module, dut: Streamer, due: Signal) -> None:
    """Bursts follow each other, cross no multiple of a burst, and are the command's words."""
    request, command = dut.memory.request, dut.command
    words, address = Signal.like(dut.left), Signal.like(dut.address)  # still to be taken by memory
    out, left = Signal.like(dut.left), Signal.like(dut.left)  # put out and not taken; not put out
    m.d.comb += [
        out.eq(Mux(request.valid, request.payload.length, 0)),
        left.eq(Mux(dut.asking, dut.left, 0)),
        Assert(words == left + out),
        Assert(words >= left),  # no more than there are words of memory
        Assert((dut.left != 0) | ~dut.asking),
        Assert(~dut.asking | (dut.address == (address + out)[: len(address)])),
        *holds_measure(dut),
    ]
    with m.If(request.valid & request.ready):
        m.d.sync += [
            address.eq(address + request.payload.length),
            words.eq(words - request.payload.length),
        ]
    with m.If(request.valid):
        m.d.comb += [
            Assert(request.payload.address == address),
            Assert((request.payload.length >= 1) & (request.payload.length <= 2)),
            Assert(request.payload.length <= words),
            Assert(~request.payload.address[0] | (request.payload.length == 1)),
        ]
    with m.If(dut.measured):
        m.d.comb += [
            Assert((dut.length >= 1) & (dut.length <= 2) & (dut.length <= dut.left)),
            Assert(~dut.address[0] | (dut.length == 1)),
            Assert(dut.final == (dut.length == dut.left)),
        ]
    with m.If(command.valid & command.ready & (command.payload.words != 0)):
        # the last burst of the command before may still be waiting for memory
        m.d.comb += [Assume(~request.valid), Assert(words == 0)]
        m.d.sync += [address.eq(command.payload.address), words.eq(command.payload.words)]


def test_streamer_asks_for_every_word_of_a_command_once_for_ever() -> None:
    formal.prove(streamer_spec(asks_once), depth=3)
    holds, _ = formal.answer(streamer_spec(asks_once, burst=4), depth=6, induction=False)
    assert not holds


def gearbox_spec(in_units: int, out_units: int, fault: str = "") -> Spec:
    """Units carry their number; all regions have the same length, which the solver chooses."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = Gearbox(4 * in_units, 4 * out_units)
        count = formal.watched(m, 2)
        m.d.comb += [
            Assume(count != 0),
            dut.command.valid.eq(formal.free(m, 1)),
            dut.command.payload.eq(count),
            dut.words.valid.eq(formal.free(m, 1)),
            dut.output.ready.eq(formal.free(m, 1)),
        ]
        if in_units == out_units:  # words pass without a register, so their source keeps the rule
            formal.assume_held(m, dut.words, "words")
        number, expected, done = Signal(4), Signal(4), Signal(2)
        for k in range(in_units):
            m.d.comb += dut.words.payload.data.word_select(k, 4).eq(number + k)
        with m.If(dut.words.valid & dut.words.ready):
            m.d.sync += number.eq(number + in_units)
        if fault == "lost":
            with m.If(dut.words.valid):
                m.d.sync += number.eq(number + in_units)
        formal.assert_stream(m, dut.output)
        with m.If(dut.output.valid):
            for k in range(out_units):
                unit = dut.output.payload.word_select(k, 4)
                m.d.comb += Assert(unit == (expected + k)[:4])
        # the first number of the next region, which begins with a word of its own
        begin, length = Signal(4), Signal(8)
        with m.Switch(count):
            for value in range(1, 4):
                with m.Case(value):
                    m.d.comb += length.eq(-(-value * out_units // in_units) * in_units)
        with m.If(dut.output.valid & dut.output.ready):
            m.d.sync += [expected.eq(expected + out_units), done.eq(done + 1)]
            with m.If(done + 1 == count):
                m.d.sync += [expected.eq(begin + length), begin.eq(begin + length), done.eq(0)]

    return Spec(build)


@formal.depths(11, 20)
def test_gearbox_loses_and_doubles_nothing(depth: int) -> None:
    for in_units, out_units in [(1, 1), (2, 3), (3, 2), (4, 1), (1, 3)]:
        formal.prove(gearbox_spec(in_units, out_units), depth=depth, induction=False)
    holds, _ = formal.answer(gearbox_spec(2, 3, "lost"), depth=11, induction=False)
    assert not holds


def skid_spec(fault: str = "") -> Spec:
    """Numbers in, the same out; the fault: the source does not wait for `ready`."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = Skid(4)
        given, got = Signal(4), Signal(4)
        valid = formal.free(m, 1)
        taken = valid & (dut.input.ready if fault != "greedy" else 1)
        m.d.comb += [
            dut.input.valid.eq(valid),
            dut.input.payload.eq(given),
            dut.output.ready.eq(formal.free(m, 1)),
        ]
        m.d.sync += [
            given.eq(given + taken),
            got.eq(got + (dut.output.valid & dut.output.ready)),
        ]
        formal.assert_stream(m, dut.output)
        with m.If(dut.output.valid):
            m.d.comb += Assert(dut.output.payload == got)

    return Spec(build)


def test_a_skid_register_loses_and_doubles_nothing() -> None:
    formal.prove(skid_spec(), depth=10, induction=False)
    holds, _ = formal.answer(skid_spec("greedy"), depth=10, induction=False)
    assert not holds


def sums_spec(latency: int, fault: str = "") -> Spec:
    """Rows promised when there is room, their sums put `latency` cycles later; both numbered."""

    def build(m: Module) -> None:
        m.submodules.dut = dut = SumQueue(4, 2)
        row, total, got = Signal(4), Signal(4), Signal(4)
        promise = formal.free(m, 1) & dut.room if fault != "greedy" else formal.free(m, 1)
        m.d.comb += [
            dut.promise.eq(promise),
            dut.row.eq(row),
            dut.slot.eq(row),
            dut.put.eq(delay(m, dut.promise, latency, "put", reset=True)),
            dut.total.eq(total.as_signed()),
            dut.sums.ready.eq(formal.free(m, 1)),
        ]
        m.d.sync += [
            row.eq(row + dut.promise),
            total.eq(total + dut.put),
            got.eq(got + (dut.sums.valid & dut.sums.ready)),
        ]
        formal.assert_stream(m, dut.sums)
        one = dut.sums.payload
        with m.If(dut.sums.valid):
            m.d.comb += [Assert(one.row == got), Assert(one.sum.as_unsigned() == got)]
            m.d.comb += Assert(one.slot == got[:2])
        m.d.comb += Assert(dut.busy == (row != got))

    return Spec(build)


@formal.depths(10, 24)
def test_no_sum_is_lost_however_long_it_waits(depth: int) -> None:
    formal.prove(sums_spec(2), depth=depth, induction=False)
    holds, _ = formal.answer(sums_spec(2, "greedy"), depth=10, induction=False)
    assert not holds
