"""From words of one width to words of another: memory words to beats, or to groups of parameters.

Words are cut without gaps inside a region of the stream; each region begins with a word of its own,
so what is left of the last word is dropped. A command says how many outputs a region has, and no
word is taken before an output needs it: the next region may be for somebody else.

Legend: bits are counted in units of g = gcd(in, out). A shift register of `slots` words takes a new
word at its top; the units held are the top ones, and `start` is where the oldest begins. An output
is the register shifted down by `start` units, in stages of two to one multiplexers, with registers
behind every third stage. Where an output is a whole number of words, no shift is needed: words are
written into their places in turn, and a queue of two in front keeps long enables apart.
"""

from __future__ import annotations

from math import gcd

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.pipeline import Skid, copy

COUNT_BITS = 32
STAGES = 3  # multiplexers between registers
SPREAD = 64  # bits that share a register of the shift: wires are slower than logic


class Gearbox(wiring.Component):
    """`command`: the outputs of the next region (0: none). `words` in, `output` out.

    One output a cycle, or one word where outputs are wider. Exactly ceil(count * out / in) words
    are taken; without `ahead` only when none is left for an output, which costs a cycle a word, but
    then `words.ready` hangs on registers alone. `error` pulses for a word that came with an error.
    `busy`: a region is not done.
    """

    def __init__(self, in_bits: int, out_bits: int, *, ahead: bool = True) -> None:
        self.ahead = ahead
        self.unit = gcd(in_bits, out_bits)
        self.in_units, self.out_units = in_bits // self.unit, out_bits // self.unit
        self.slots = -(-(self.out_units + self.in_units - 1) // self.in_units)
        self.units = self.slots * self.in_units
        super().__init__(
            {
                "command": In(stream.Signature(unsigned(COUNT_BITS))),
                "words": In(stream.Signature(ports.memory_word(in_bits))),
                "output": Out(stream.Signature(unsigned(out_bits))),
                "error": Out(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.in_units == self.out_units:
            self._pass_on(m)
            return m
        if self.in_units == 1:
            self._collect(m)
            return m
        active, issue, room, last = Signal(), Signal(), Signal(), Signal()
        start = Signal(range(self.units + 1), init=self.units)
        held = Signal(self.units * self.unit, reset_less=True)
        reach = self.units - self.out_units  # the last start that leaves a whole output
        ready, put, early = Signal(), Signal(), Signal()
        if self.ahead:
            m.d.comb += early.eq(room & ~last & (start + self.out_units > reach))
        m.d.comb += [
            ready.eq(active & (start <= reach)),
            issue.eq(ready & room),
            # wanted for the next output, or for the one behind that
            self.words.ready.eq(active & ((start > reach) | early)),
            put.eq(self.words.valid & self.words.ready),
        ]
        m.d.sync += self.error.eq(put & self.words.payload.error)
        with m.If(put):
            m.d.sync += held.eq(Cat(held, self.words.payload.data)[-len(held) :])
        moved = Signal(range(self.units + 1))
        m.d.comb += moved.eq(start + Mux(issue, self.out_units, 0) - Mux(put, self.in_units, 0))
        with m.If(issue & last):
            m.d.comb += moved.eq(self.units)
        m.d.sync += start.eq(moved)
        self._count(m, active, issue, last)
        full = self._shift(m, moved, held, ready, room, reach)
        m.d.comb += self.busy.eq(active | full)
        return m

    def _pass_on(self, m: Module) -> None:
        """Words are outputs: they are counted, and no register stands between."""
        active, issue, last = Signal(), Signal(), Signal()
        words, output = self.words, self.output
        m.d.comb += [
            words.ready.eq(active & output.ready),
            output.valid.eq(active & words.valid),
            output.payload.eq(words.payload.data),
            issue.eq(output.valid & output.ready),
            self.busy.eq(active),
        ]
        m.d.sync += self.error.eq(issue & words.payload.error)
        self._count(m, active, issue, last)

    def _collect(self, m: Module) -> None:
        """An output is `out_units` words. A place is open from its turn on, whether a word has come
        or not, so that registers alone say which bits are written.
        """
        places, width = self.out_units, self.unit
        active, ends, last = Signal(), Signal(), Signal()
        coming, turn = Signal(places, init=1), Signal(places, init=1)  # one bit each
        full, put, got, free = Signal(), Signal(), Signal(), Signal()
        m.submodules.queue = queue = Skid(width)
        words, output, next_word = self.words, self.output, queue.output
        m.d.comb += [
            words.ready.eq(active & queue.input.ready),
            put.eq(words.valid & words.ready),
            queue.input.valid.eq(words.valid & active),
            queue.input.payload.eq(words.payload.data),
            ends.eq(put & coming[-1]),
            free.eq(~full | output.ready),
            # an output waits for its taker in turn 0 only
            next_word.ready.eq(free | ~turn[0]),
            got.eq(next_word.valid & next_word.ready),
            output.valid.eq(full),
            self.busy.eq(active | next_word.valid | full | ~turn[0]),
        ]
        m.d.sync += [
            self.error.eq(put & words.payload.error),
            full.eq((got & turn[-1]) | (full & ~output.ready)),
        ]
        with m.If(put):
            m.d.sync += coming.eq(coming.rotate_left(1))
        with m.If(got):
            m.d.sync += turn.eq(turn.rotate_left(1))
        for place in range(places):
            part = Signal(width, name=f"part_{place}", reset_less=True)
            with m.If(turn[place] & (free if place == 0 else 1)):
                m.d.sync += part.eq(next_word.payload)
            m.d.comb += output.payload[place * width :][:width].eq(part)
        self._count(m, active, ends, last)

    def _count(self, m: Module, active: Signal, issue: Signal, last: Signal) -> None:
        left = Signal(COUNT_BITS, reset_less=True)  # outputs of the region that were not issued
        m.d.comb += self.command.ready.eq(~active)
        with m.If(issue):
            m.d.sync += [left.eq(left - 1), last.eq(left == 2), active.eq(~last)]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [
                left.eq(self.command.payload),
                last.eq(self.command.payload == 1),
                active.eq(self.command.payload != 0),
            ]

    def _shift(
        self, m: Module, moved: Signal, held: Signal, ready: Signal, room: Signal, reach: int
    ) -> Signal:
        """Cut the oldest output out of `held`; gives whether an output is on its way.

        moved: the next start. Each SPREAD bits of a multiplexer have selects of their own.
        """
        bits = reach.bit_length()
        valid, value, ways = ready, held, room
        selects = [copy(m, moved[:bits]) for _ in range(0, len(held), SPREAD)]
        waiting = []
        for top in range(bits, 0, -STAGES):
            bottom = max(0, top - STAGES)
            for stage in reversed(range(bottom, top)):
                size = (self.out_units + min(reach, (1 << stage) - 1)) * self.unit
                near, far = value[:size], value[self.unit << stage :][:size]
                chosen = Signal(size)  # a signal: expressions of expressions would grow as powers
                m.d.comb += chosen.eq(
                    Cat(
                        Mux(selects[k][stage], far[at : at + SPREAD], near[at : at + SPREAD])
                        for k, at in enumerate(range(0, size, SPREAD))
                    )
                )
                value = chosen
            have, onward = Signal(), Signal()
            kept = Signal(len(value), reset_less=True)
            m.d.comb += ways.eq(~have | onward)
            with m.If(ways):
                m.d.sync += [have.eq(valid), kept.eq(value)]
                if bottom:
                    selects = [copy(m, select[:bottom]) for select in selects]
            valid, value, ways = have, kept, onward
            waiting.append(have)
        m.d.comb += [
            self.output.valid.eq(valid),
            self.output.payload.eq(value),
            ways.eq(self.output.ready),
        ]
        return Cat(waiting).any()
