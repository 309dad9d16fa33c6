"""Products of ternary rows, one beat of weights a cycle, and int8 activations.

A beat is taken while there is room for its row's sum behind the pipeline: `sums` may stall for as
long as it likes, and the pipeline itself never does. So nothing but registers decides whether a
beat is taken, and there is no enable of a thousand registers.

    beats -> Decoder -------------------\
             ActivationMemory (address) -+-> TernaryArray -> accumulator -> queue of sums -> sums

Legend: a row is `beats` beats; the rows of `slots` matrices take turns, and slot s reads its
activations from beat act + s * beats on. Since these follow each other, the address only counts up
until the last slot's row is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import decode, ports
from nomatmul.hardware.rtl.activation_memory import READ_LATENCY, ActivationMemory
from nomatmul.hardware.rtl.array import TernaryArray, add
from nomatmul.hardware.rtl.pipeline import delay

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

QUEUE = 32  # sums on their way or waiting: more than the pipeline is long


class ProductUnit(wiring.Component):
    """`command` and `beats` in, one of `sums` out for each row, in order.

    rows or beats of 0: nothing is taken or given; slots of 0 acts as 1. `illegal` pulses for a beat
    with an illegal code. `busy` until the last sum is taken. An activation counts where it was
    written two cycles or more before the command is taken.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(ports.ProductCommand)),
                "beats": In(stream.Signature(unsigned(design.beat_bits))),
                "sums": Out(stream.Signature(ports.product_sum(design.sum_bits))),
                "activation": In(ports.ActivationWrite(design)),
                "illegal": Out(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        m.submodules.control = control = _Control()
        m.submodules.queue = queue = SumQueue(design.sum_bits, QUEUE)
        m.submodules.decoder = decoder = decode.Decoder(design.packing, design.lanes)
        m.submodules.memory = activations = ActivationMemory(design)
        m.submodules.array = array = TernaryArray(design.lanes)
        wiring.connect(m, wiring.flipped(self.command), control.command)
        wiring.connect(m, wiring.flipped(self.activation), activations.write)
        wiring.connect(m, queue.sums, wiring.flipped(self.sums))

        take = Signal()
        m.d.comb += [
            take.eq(self.beats.valid & self.beats.ready),
            self.beats.ready.eq(control.active & queue.room),
            control.take.eq(take),
            queue.promise.eq(take & control.end),
            queue.slot.eq(control.slot),
            queue.row.eq(control.row),
            queue.last.eq(control.last),
            self.busy.eq(control.active | queue.busy),
        ]
        latency = decode.LATENCY[design.packing]
        decoded = max(1 + latency, READ_LATENCY)  # codes and activations meet: cycles from `take`
        m.d.comb += decoder.beat.eq(delay(m, self.beats.payload, decoded - latency, "beat"))
        m.d.comb += [
            activations.address.eq(delay(m, control.address, decoded - READ_LATENCY, "address")),
            array.codes.eq(decoder.codes),
            array.activations.eq(activations.data),
            self.illegal.eq(decoder.illegal & delay(m, take, decoded + 2, "checked", reset=True)),
        ]
        self._accumulate(m, control, queue, take, array, decoded + array.latency)
        return m

    def _accumulate(
        self,
        m: Module,
        control: _Control,
        queue: SumQueue,
        take: Value,
        array: TernaryArray,
        latency: int,
    ) -> None:
        total = Signal(signed(self.design.sum_bits), reset_less=True)
        valid = delay(m, take, latency, "valid", reset=True)
        first = delay(m, control.first, latency, "first")
        so_far = Mux(first, 0, total)
        with m.If(valid):
            m.d.sync += total.eq(add(so_far.as_signed(), array.sum, array.carry))
        m.d.comb += [
            queue.put.eq(delay(m, take & control.end, latency + 1, "end", reset=True)),
            queue.total.eq(total),
        ]


class _Control(wiring.Component):
    """Counts beats, rows and slots; all of it about the beat that is taken next."""

    def __init__(self) -> None:
        super().__init__(
            {
                "command": In(stream.Signature(ports.ProductCommand)),
                "take": In(1),
                "active": Out(1),
                "first": Out(1),  # of its row
                "end": Out(1),  # of its row
                "last": Out(1),  # row of the command
                "slot": Out(2),
                "row": Out(ports.ROW_BITS),
                "address": Out(ports.BEAT_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        command = self.command.payload
        act, beats = Signal(ports.BEAT_BITS), Signal(ports.BEAT_BITS)
        slots = Signal(2)
        beats_left, rows_left = Signal(ports.BEAT_BITS), Signal(ports.ROW_BITS)
        single, wrap = Signal(), Signal()
        m.d.comb += [self.command.ready.eq(~self.active), wrap.eq(self.slot + 1 >= slots)]
        with m.If(self.take):
            m.d.sync += [
                self.address.eq(self.address + 1),
                self.first.eq(self.end),
                self.end.eq(Mux(self.end, single, beats_left == 2)),
                beats_left.eq(Mux(self.end, beats, beats_left - 1)),
            ]
            with m.If(self.end):
                m.d.sync += [
                    self.row.eq(self.row + 1),
                    rows_left.eq(rows_left - 1),
                    self.last.eq(rows_left == 2),
                    self.active.eq(~self.last),
                    self.slot.eq(Mux(wrap, 0, self.slot + 1)),
                ]
                with m.If(wrap):
                    m.d.sync += self.address.eq(act)
        with m.If(~self.active):  # taken or not: no register waits for `valid`
            m.d.sync += [
                act.eq(command.act),
                beats.eq(command.beats),
                slots.eq(command.slots),
                single.eq(command.beats == 1),
                self.first.eq(1),
                self.end.eq(command.beats == 1),
                self.last.eq(command.rows == 1),
                self.slot.eq(0),
                self.row.eq(0),
                self.address.eq(command.act),
                beats_left.eq(command.beats),
                rows_left.eq(command.rows),
            ]
            with m.If(self.command.valid):
                m.d.sync += self.active.eq((command.rows != 0) & (command.beats != 0))
        return m


class SumQueue(wiring.Component):
    """Sums with what is known of their rows since their last beats were taken (`promise`).

    `room`: a further row may be promised. `put` comes once for each promise, in order.
    """

    def __init__(self, sum_bits: int, depth: int) -> None:
        self.sum_bits, self.depth = sum_bits, depth
        super().__init__(
            {
                "promise": In(1),
                "slot": In(2),
                "row": In(ports.ROW_BITS),
                "last": In(1),
                "room": Out(1),
                "put": In(1),
                "total": In(signed(sum_bits)),
                "sums": Out(stream.Signature(ports.product_sum(sum_bits))),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        about = data.StructLayout({"slot": 2, "row": ports.ROW_BITS, "last": 1})
        m.submodules.rows = rows = fifo.SyncFIFO(width=about.size, depth=self.depth)
        m.submodules.totals = totals = fifo.SyncFIFO(width=self.sum_bits, depth=self.depth)
        promised = Signal(range(self.depth + 1))
        back, front = data.View(about, rows.w_data), data.View(about, rows.r_data)
        out = Signal.like(self.sums.payload, reset_less=True)
        move = Signal()
        m.d.comb += [
            # a cycle later, long before the sum: what decides a promise comes late in its cycle
            back.slot.eq(delay(m, self.slot, 1, "slot")),
            back.row.eq(delay(m, self.row, 1, "row")),
            back.last.eq(delay(m, self.last, 1, "last")),
            rows.w_en.eq(delay(m, self.promise, 1, "promise", reset=True)),
            totals.w_data.eq(self.total),
            totals.w_en.eq(self.put),
            self.room.eq(~promised[-1]),
            move.eq(totals.r_rdy & (~self.sums.valid | self.sums.ready)),
            rows.r_en.eq(move),
            totals.r_en.eq(move),
            self.busy.eq((promised != 0) | self.sums.valid),
            self.sums.payload.eq(out),
        ]
        m.d.sync += promised.eq(promised + self.promise - move)
        with m.If(self.sums.ready):
            m.d.sync += self.sums.valid.eq(0)
        with m.If(move):
            m.d.sync += [
                self.sums.valid.eq(1),
                out.sum.eq(totals.r_data.as_signed()),
                out.slot.eq(front.slot),
                out.row.eq(front.row),
                out.last.eq(front.last),
            ]
        return m
