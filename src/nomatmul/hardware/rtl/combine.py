"""COMBINE: y[k] = sum over the visits a of q[a] * t_out[row_a][k], exact, of visited rows only.

One process asks for the records of the visited rows, in the order of the list that WALK left; the
other adds them up, C columns a cycle: a wide memory holds the sums, each chunk of a record is read,
changed and written (four cycles: read, keep, add, write). Between two records three cycles pass, so
no column is read while its sum is on the way. Then the sums go out one by one.

A record is 2-bit coded whatever the packing of linears is: column k in bits 2k and 2k + 1 (code =
t + 1), in whole words. The values q are the first activations (act = 0): QUANT's writes are kept
here as well.

Legend of widths: C `combine_lanes`, A `tree_rows`, sums have S = bits of 127 * A, and the sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import exact_log2

from nomatmul.hardware.design import TREE_ROW_BITS as ROW_BITS
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.gearbox import Gearbox
from nomatmul.hardware.rtl.walk import NO_CHECK

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class Combine(wiring.Component):
    """Adds up the visited rows of one command. Ports:

    `visits` reads the list of rows (data one cycle after the address). `activation` is what QUANT
    writes. `row` tells the row unit to add `results` to the residual. `illegal` pulses for a code 3
    (it counts as 0), `memory_error` for a word with an error, `refused` for a command that there is
    no room for or whose stride is not that of its columns: then nothing is done. `busy` from the
    cycle after a command was taken until the last sum is handed on.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.chunks = -(-design.tree_columns // design.combine_lanes)
        # a chunk of `column` is taken: named here so that a proof can watch them
        self.taken, self.column = Signal(), Signal(range(self.chunks))
        super().__init__(
            {
                "command": In(stream.Signature(ports.CombineCommand)),
                "fetch": Out(stream.Signature(ports.ReadCommand)),
                "words": In(stream.Signature(ports.memory_word(design.memory_bits))),
                "visits": Out(ports.GroupRead(design.tree_rows, ROW_BITS, 1)),
                "activation": In(ports.ActivationWrite(design)),
                "row": Out(stream.Signature(ports.RowCommand)),
                "results": Out(stream.Signature(ports.product_sum(design.sum_bits))),
                "busy": Out(1),
                "memory_error": Out(1),
                "illegal": Out(1),
                "refused": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design, taken, column = self.design, self.taken, self.column
        command, chunks = Signal(ports.CombineCommand), Signal(range(self.chunks + 1))
        visit, records = Signal(range(design.tree_rows)), Signal(range(design.tree_rows + 1))
        start, q, drained = Signal(), Signal(signed(8), reset_less=True), Signal()
        m.submodules.gearbox = gearbox = Gearbox(design.memory_bits, 2 * design.combine_lanes)
        connect(m, flipped(self.words), gearbox.words)
        m.d.comb += [
            self.memory_error.eq(gearbox.error),
            taken.eq(gearbox.output.valid & gearbox.output.ready),
        ]
        sums = self._add(m, gearbox.output.payload, taken, column, visit == 0, q, drained)
        value = self._values(m, visit)
        self._ask(m, command, start)
        # the gearbox is told of `records` regions, one behind the other
        m.d.comb += [gearbox.command.valid.eq(records != 0), gearbox.command.payload.eq(chunks)]
        with m.If(start):
            m.d.sync += records.eq(command.count)
        with m.Elif(gearbox.command.valid & gearbox.command.ready):
            m.d.sync += records.eq(records - 1)
        self._control(m, command, chunks, start, gearbox, visit, column, q, value, drained, sums)
        return m

    def _values(self, m: Module, visit: Any) -> Any:
        """The copy of the first activations; that of `visit`, two cycles behind it."""
        lanes = self.design.element_lanes
        groups = -(-self.design.tree_rows // lanes)
        m.submodules.values = values = memory.Memory(
            shape=data.ArrayLayout(signed(8), lanes), depth=groups, init=[], attrs=NO_CHECK
        )
        write, read = values.write_port(), values.read_port()
        kept = Signal.like(read.data, reset_less=True)  # block RAM answers late in a cycle
        m.d.sync += kept.eq(read.data)
        m.d.comb += [
            write.en.eq(self.activation.valid & (self.activation.address < groups)),
            write.addr.eq(self.activation.address),
            write.data.eq(self.activation.data),
            read.addr.eq(visit >> exact_log2(lanes)),
        ]
        return kept[visit[: exact_log2(lanes)]]

    def _add(
        self, m: Module, codes: Any, taken: Any, column: Any, first: Any, q: Any, drained: Any
    ) -> Any:
        """Adds q times a chunk's codes to the sums of `column`; those of two cycles ago."""
        lanes = self.design.combine_lanes
        shape = data.ArrayLayout(signed((127 * self.design.tree_rows).bit_length() + 1), lanes)
        m.submodules.sums = sums = memory.Memory(
            shape=shape, depth=self.chunks, init=[], attrs=NO_CHECK
        )
        read, write = sums.read_port(), sums.write_port()
        # one cycle behind `taken`: block RAM answers late, so its word is kept; two: what is added
        codes_1, kept = Signal(2 * lanes, reset_less=True), Signal(shape, reset_less=True)
        column_1, column_2 = Signal.like(column), Signal.like(column)
        first_1, first_2 = Signal(), Signal()
        taken_1, taken_2, bad = Signal(), Signal(), Signal()
        m.d.sync += [
            taken_1.eq(taken),
            codes_1.eq(codes),
            column_1.eq(column),
            first_1.eq(first),
            taken_2.eq(taken_1),
            column_2.eq(column_1),
            first_2.eq(first_1),
            kept.eq(read.data),
            self.illegal.eq(taken_1 & bad),
            write.en.eq(taken_2),
            write.addr.eq(column_2),
        ]
        m.d.comb += [read.addr.eq(column), drained.eq(~(taken_1 | taken_2 | write.en))]
        m.d.comb += bad.eq(Cat(codes_1.word_select(k, 2) == 3 for k in range(lanes)).any())
        minus_q = Signal(signed(9), reset_less=True)
        m.d.sync += minus_q.eq(-q)
        for k in range(lanes):
            code, term = codes_1.word_select(k, 2), Signal(signed(9), reset_less=True)
            m.d.sync += term.eq(Mux(code == 2, q, Mux(code == 0, minus_q, 0)))
            m.d.sync += write.data[k].eq(Mux(first_2, 0, kept[k]) + term)
        return kept

    def _ask(self, m: Module, command: Any, start: Any) -> None:
        """Asks for the records of the visited rows: address = base + row * stride."""
        asked = Signal(range(self.design.tree_rows + 1))
        row, offset = Signal(ROW_BITS), Signal(ports.WORD_ADDRESS_BITS)
        fetch = self.fetch
        m.d.comb += [
            self.visits.address.eq(asked),
            self.visits.enable.eq(1),
            fetch.payload.words.eq(command.stride),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += asked.eq(0)
                with m.If(start):
                    m.next = "LIST"
            with m.State("LIST"):
                m.next = "ROW"
            with m.State("ROW"):
                m.d.sync += row.eq(self.visits.data[0])
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                m.d.sync += [offset.eq(row * command.stride), asked.eq(asked + 1)]
                m.next = "ADD"
            with m.State("ADD"):
                m.d.sync += fetch.payload.address.eq(command.base + offset)
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += fetch.valid.eq(1)
                with m.If(fetch.ready):
                    m.next = "ROW"
                    with m.If(asked == command.count):
                        m.next = "IDLE"

    def _control(
        self, m, command, chunks, start, gearbox, visit, column, q, value, drained, sums
    ) -> None:
        """Checks the command, leads the records through `_add` and sends the sums."""
        m.d.comb += [
            self.row.payload.epilogue.eq(ports.Epilogue.ADD),
            self.row.payload.rows.eq(command.rows),
            self.row.payload.slots.eq(1),
            self.row.payload.scalars[0].eq(command.m),
            self.row.payload.fraction.eq(command.fraction),
            self.row.payload.dst.eq(command.dst),
            self.row.payload.aux.eq(command.aux),
        ]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                m.d.sync += [command.eq(self.command.payload), visit.eq(0), column.eq(0)]
                with m.If(self.command.valid):
                    m.next = "CHUNKS"
            self._check_states(m, command, chunks, start)
            with m.State("RECORD"):
                m.next = "KEEP"
            with m.State("KEEP"):
                m.next = "VALUE"
            with m.State("VALUE"):  # `visit` is as old as its value needs
                m.d.sync += q.eq(value)
                m.next = "ADD"
            with m.State("ADD"):
                m.d.comb += gearbox.output.ready.eq(1)
                with m.If(gearbox.output.valid):
                    m.d.sync += column.eq(column + 1)
                    with m.If(column + 1 == chunks):
                        m.d.sync += [column.eq(0), visit.eq(visit + 1)]
                        m.next = "RECORD"
                        with m.If(visit + 1 == command.count):
                            m.next = "DRAIN"
            self._send_states(m, command, column, drained, sums)
            m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))

    def _check_states(self, m: Module, command: Any, chunks: Any, start: Any) -> None:
        """CHUNKS to BEGIN: what a record has of them; refuses a command, or hands it on."""
        design, lanes = self.design, self.design.combine_lanes
        words, over = Signal(ports.BURST_BITS), Signal()
        all_chunks = (command.rows + (lanes - 1)) >> exact_log2(lanes)
        bits = (chunks * (2 * lanes)) + (design.memory_bits - 1)
        with m.State("CHUNKS"):
            m.d.sync += [
                chunks.eq(all_chunks),
                over.eq(
                    (all_chunks > self.chunks)
                    | (command.rows == 0)
                    | (command.count == 0)
                    | (command.count > design.tree_rows)
                ),
            ]
            m.next = "WORDS"
        with m.State("WORDS"):
            m.d.sync += words.eq(bits >> exact_log2(design.memory_bits))
            m.next = "CHECK"
        with m.State("CHECK"):
            m.d.sync += over.eq(over | (words != command.stride))
            m.next = "BEGIN"
        with m.State("BEGIN"):
            with m.If(over):
                m.d.comb += self.refused.eq(1)
                m.next = "IDLE"
            with m.Else():
                m.d.comb += [self.row.valid.eq(1), start.eq(self.row.ready)]
                with m.If(self.row.ready):
                    m.next = "RECORD"

    def _send_states(self, m: Module, command: Any, column: Any, drained: Any, sums: Any) -> None:
        """DRAIN to SEND: the sums one by one, `lanes` of them in a shift register."""
        lanes = self.design.combine_lanes
        shift, sent = Signal(sums.shape(), reset_less=True), Signal(ports.ROW_BITS)
        left = Signal(range(lanes))
        m.d.comb += [
            self.results.payload.sum.eq(shift[0]),
            self.results.payload.row.eq(sent),
            self.results.payload.last.eq(sent + 1 == command.rows),
        ]
        with m.State("DRAIN"):
            m.d.sync += sent.eq(0)
            with m.If(drained):
                m.next = "FIRST"
        with m.State("FIRST"):  # sums of column 0 are read behind the last write
            m.next = "SECOND"
        with m.State("SECOND"):  # ... and kept
            m.next = "TAKE"
        with m.State("TAKE"):
            m.d.sync += [shift.eq(sums), column.eq(column + 1), left.eq(lanes - 1)]
            m.next = "SEND"
        with m.State("SEND"):
            m.d.comb += self.results.valid.eq(1)
            with m.If(self.results.ready):
                m.d.sync += [
                    sent.eq(sent + 1),
                    left.eq(left - 1),
                    shift.eq(shift.as_value() >> len(shift[0])),
                ]
                with m.If(left == 0):
                    m.d.sync += [shift.eq(sums), column.eq(column + 1), left.eq(lanes - 1)]
                with m.If(self.results.payload.last):
                    m.next = "IDLE"
