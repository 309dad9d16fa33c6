"""WALK: from the roots down, each tree's next node fetched as soon as its decision is known.

Three processes run side by side, all in the order of `Visits` (level by level, tree by tree), so
that the latency of memory is hidden behind the nodes of the other trees: one asks for records, one
hands their weights to the product unit and keeps norm_out's weight, one numbers the sums for the
row unit and decides. A record may be asked for once the sum of the same tree's level above is in:
`slack` counts how many may. A sum above 0 goes to child 2j + 2, else (0 too) to 2j + 1.

A record is the words of `beats` beats, then one whose low 16 bits are norm_out's weight.

Legend of widths: ROW_BITS (18) of a row of all trees, LEVEL_BITS of levels, M of a memory word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amaranth import Module, Mux, Signal, unsigned
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from nomatmul.hardware.design import TREE_ROW_BITS as ROW_BITS
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.gearbox import COUNT_BITS
from nomatmul.hardware.rtl.visits import LEVEL_BITS, Visits

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

# Nothing is read in the cycle in which it is written and then used: no bypass of block RAM.
NO_CHECK = {"no_rw_check": 1}
_COUNT_BITS = ports.ROW_BITS + 2  # of counts that may turn out to be too large


class Walk(wiring.Component):
    """Walks the trees of one command. Ports:

    `product` and `row` get one command for the whole walk. `region` and `product_words` go to the
    gearbox in front of the product unit, one region a record. `sums` come back one a record and go
    on as `results`: `row` is the visit's index, `last` marks the last that comes. `visit` writes
    the list of rows, `parameter` the weights of norm_out. `memory_error` pulses for a word with an
    error, `refused` for a command with more visits or rows than there is room for, or whose stride
    is not that of its beats: then nothing is done. `busy` from the cycle after a command was taken
    until all is written and handed on.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        # named here so that a proof can watch them: the command, how many records may be asked for,
        # whether one is being asked for, whether the processes run, which of them are done
        self.held, self.slack = Signal(ports.WalkCommand), Signal(range(design.tree_rows + 1))
        self.asking, self.running, self.ended = Signal(), Signal(), Signal(3)
        self.decided = Signal()  # a decision gets into memory
        word = ports.memory_word(design.memory_bits)
        sums = ports.product_sum(design.sum_bits)
        super().__init__(
            {
                "command": In(stream.Signature(ports.WalkCommand)),
                "fetch": Out(stream.Signature(ports.ReadCommand)),
                "words": In(stream.Signature(word)),
                "product": Out(stream.Signature(ports.ProductCommand)),
                "region": Out(stream.Signature(unsigned(COUNT_BITS))),
                "product_words": Out(stream.Signature(word)),
                "row": Out(stream.Signature(ports.RowCommand)),
                "sums": In(stream.Signature(sums)),
                "results": Out(stream.Signature(sums)),
                "parameter": Out(ports.parameter_write(design)),
                "visit": Out(ports.ElementWrite(design.tree_rows, ROW_BITS)),
                "busy": Out(1),
                "memory_error": Out(1),
                "refused": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        command = self.held
        levels, nodes, start = Signal(LEVEL_BITS), Signal(ROW_BITS), Signal()
        orders = [Visits(self.design.tree_rows, ROW_BITS) for _ in range(3)]
        m.submodules.asked, m.submodules.loaded, m.submodules.decided = orders
        for number, order in enumerate(orders):
            m.d.comb += [
                order.start.eq(start),
                order.trees.eq(command.trees),
                order.levels.eq(levels),
                order.nodes.eq(nodes),
            ]
            m.d.comb += self.ended[number].eq(order.done)
        asked, loaded, decided = orders
        self._control(m, command, levels, nodes, start)
        right = self._decide(m, decided)
        self._ask(m, command, start, asked, right)
        self._load(m, command, loaded)
        return m

    def _control(self, m: Module, command: Any, levels: Any, nodes: Any, start: Any) -> None:
        """Counts visits, rows and a tree's nodes level by level, checks them, tells the row unit
        and lets the three processes go."""
        left, visits, rows = Signal(LEVEL_BITS), Signal(_COUNT_BITS), Signal(_COUNT_BITS)
        over, too_many = Signal(), Signal()
        regions = Signal(range(self.design.tree_rows + 1))  # that the gearbox has to be told
        weight_words = self._weight_words(m, command)
        m.d.comb += [
            too_many.eq((visits > self.design.tree_rows) | (rows >> ROW_BITS).any()),
            self.product.payload.rows.eq(visits),
            self.product.payload.slots.eq(1),
            self.product.payload.beats.eq(command.beats),
            self.product.payload.act.eq(command.act),
            self.region.payload.eq(command.beats),
            self.row.payload.epilogue.eq(ports.Epilogue.SILU),
            self.row.payload.rows.eq(visits),
            self.row.payload.slots.eq(1),
            self.row.payload.scalars[0].eq(command.m),
            self.row.payload.fraction.eq(command.fraction),
            self.row.payload.dst.eq(command.dst),
        ]
        waits = self.results.valid | self.parameter.valid
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                m.d.sync += [
                    command.eq(self.command.payload),
                    levels.eq(self.command.payload.depth + 1),
                    left.eq(self.command.payload.depth),
                    nodes.eq(0),
                    visits.eq(0),
                    rows.eq(0),
                    over.eq(0),
                ]
                with m.If(self.command.valid):
                    m.next = "COUNT"
            with m.State("COUNT"):  # a cycle a level
                m.d.sync += [
                    left.eq(left - 1),
                    nodes.eq(2 * nodes + 1),
                    rows.eq(2 * rows + command.trees),
                    visits.eq(visits + command.trees),
                    over.eq(over | too_many),
                ]
                with m.If(left == 0):
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += over.eq(over | too_many | (command.trees == 0))
                m.next = "BEGIN"
            with m.State("BEGIN"):
                m.next = "ROW"
                with m.If(over | (weight_words == 0) | (weight_words + 1 != command.stride)):
                    m.d.comb += self.refused.eq(1)
                    m.next = "IDLE"
            with m.State("ROW"):
                m.d.comb += self.row.valid.eq(1)
                with m.If(self.row.ready):
                    m.next = "PRODUCT"
            with m.State("PRODUCT"):
                m.d.comb += [self.product.valid.eq(1), start.eq(self.product.ready)]
                with m.If(self.product.ready):
                    m.d.sync += regions.eq(visits)
                    m.next = "RUN"
            with m.State("RUN"), m.If(self.ended.all() & (regions == 0) & ~waits):
                m.next = "IDLE"
            m.d.comb += [self.busy.eq(~fsm.ongoing("IDLE")), self.running.eq(fsm.ongoing("RUN"))]
        m.d.comb += self.region.valid.eq(regions != 0)
        with m.If(self.region.valid & self.region.ready):
            m.d.sync += regions.eq(regions - 1)

    def _weight_words(self, m: Module, command: Any) -> Any:
        """The words of a record's weights, two cycles behind the command."""
        design = self.design
        bits = Signal(ports.BEAT_BITS + design.beat_bits.bit_length())
        words = Signal(len(bits))
        m.d.sync += [
            bits.eq(command.beats * design.beat_bits),
            words.eq((bits + (design.memory_bits - 1)) >> exact_log2(design.memory_bits)),
        ]
        return words

    def _decide(self, m: Module, order: Visits) -> Any:
        """Numbers the sums for the row unit; the memory of each tree's last decision."""
        m.submodules.right = right = memory.Memory(
            shape=1, depth=self.design.tree_rows, init=[], attrs=NO_CHECK
        )
        write = right.write_port()
        taken, sums, results = Signal(), self.sums, self.results
        m.d.comb += [
            sums.ready.eq(~results.valid & ~order.done),
            taken.eq(sums.valid & sums.ready),
            order.next.eq(taken),
        ]
        m.d.sync += [
            write.en.eq(taken),
            write.addr.eq(order.tree),
            write.data.eq(sums.payload.sum > 0),
        ]
        m.d.comb += self.decided.eq(write.en)
        with m.If(taken):
            m.d.sync += [
                results.valid.eq(1),
                results.payload.sum.eq(sums.payload.sum),
                results.payload.row.eq(order.index),
                results.payload.last.eq(order.last),
            ]
        with m.Elif(results.ready):
            m.d.sync += results.valid.eq(0)
        return right

    def _ask(self, m: Module, command: Any, start: Any, order: Visits, right: Any) -> None:
        """Asks for the records: row = root + j, address = base + row * stride."""
        visits = self.design.tree_rows
        m.submodules.left_child = left_child = memory.Memory(
            shape=ROW_BITS, depth=visits, init=[], attrs=NO_CHECK
        )
        # a tree's left child of its last node, and whether it goes right of that
        pending, write, side = left_child.read_port(), left_child.write_port(), right.read_port()
        slack = self.slack
        left, goes_right = Signal(ROW_BITS), Signal()
        node, row = Signal(ROW_BITS), Signal(ROW_BITS)
        offset = Signal(ports.WORD_ADDRESS_BITS)
        fetch = self.fetch
        m.d.comb += [
            pending.addr.eq(order.tree),
            side.addr.eq(order.tree),
            write.addr.eq(order.tree),
            write.data.eq(2 * node + 1),
            self.visit.address.eq(order.index),
            self.visit.data.eq(row),
            fetch.payload.words.eq(command.stride),
        ]
        with m.If(start):
            m.d.sync += slack.eq(command.trees)
        with m.Else():
            m.d.sync += slack.eq(slack + self.decided - order.next)
        with m.FSM() as fsm:
            with m.State("WAIT"), m.If((slack != 0) & ~order.done):  # the decision is being read
                m.next = "KEEP"
            with m.State("KEEP"):  # block RAM answers late in a cycle
                m.d.sync += [left.eq(pending.data), goes_right.eq(side.data)]
                m.next = "NODE"
            with m.State("NODE"):
                m.d.sync += node.eq(Mux(order.first_level, 0, left + goes_right))
                m.next = "ROW"
            with m.State("ROW"):
                m.d.comb += write.en.eq(1)
                m.d.sync += row.eq(order.root + node)
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                m.d.comb += self.visit.valid.eq(1)
                m.d.sync += offset.eq(row * command.stride)
                m.next = "ADD"
            with m.State("ADD"):
                m.d.sync += fetch.payload.address.eq(command.base + offset)
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [fetch.valid.eq(1), order.next.eq(fetch.ready)]
                with m.If(fetch.ready):
                    m.next = "WAIT"
            m.d.comb += self.asking.eq(~fsm.ongoing("WAIT"))

    def _load(self, m: Module, command: Any, order: Visits) -> None:
        """Hands the weights of each record on, and writes norm_out's weight."""
        design, words, out = self.design, self.words, self.product_words
        left, address = Signal(ports.BURST_BITS), Signal(ports.ELEMENT_BITS)
        group = exact_log2(design.element_lanes)
        m.d.sync += [
            self.memory_error.eq(words.valid & words.ready & words.payload.error),
            self.parameter.valid.eq(0),
        ]
        m.d.comb += [
            out.payload.eq(words.payload),
            self.parameter.address.eq(address >> group),
            self.parameter.mask.eq(1 << address[:group]),
        ]
        with m.FSM():
            with m.State("RECORD"):
                m.d.sync += left.eq(command.stride - 1)
                with m.If(~order.done):
                    m.next = "WEIGHTS"
            with m.State("WEIGHTS"):
                m.d.comb += [out.valid.eq(words.valid), words.ready.eq(out.ready)]
                with m.If(words.valid & out.ready):
                    m.d.sync += left.eq(left - 1)
                    with m.If(left == 1):
                        m.next = "NORM"
            with m.State("NORM"):
                m.d.comb += [words.ready.eq(1), order.next.eq(words.valid)]
                m.d.sync += address.eq(command.wout + order.index)
                for element in self.parameter.data:
                    m.d.sync += element.eq(words.payload.data[: design.weight_bits].as_signed())
                with m.If(words.valid):
                    m.d.sync += self.parameter.valid.eq(1)
                    m.next = "RECORD"
