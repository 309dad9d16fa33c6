"""The accelerator: all units, and the wires between them.

    memory -> guard -> streamer -> gearbox -> product unit -> row unit -> vector memory, logits
                               `-> loader  -> parameter memory, embedding -> row unit
    vector memory -> vector unit -> activations of the product unit, scalars of the sequencer
    host -> program, tokens -> sequencer -> a command to each unit

With `trees` a second reader of memory fetches the rows that trees visit; while the tree unit runs,
gearbox, product unit and row unit are its own. Who drives a shared unit follows from the opcode of
the instruction that runs, kept in a register: it changes cycles before any unit has a command.
"""

from typing import Any

from amaranth import Cat, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nomatmul.hardware import isa, registers
from nomatmul.hardware.design import Design
from nomatmul.hardware.registers import Status
from nomatmul.hardware.rtl import commands, ports, probe
from nomatmul.hardware.rtl.arbiter import Arbiter
from nomatmul.hardware.rtl.counters import Counters
from nomatmul.hardware.rtl.fetcher import RowFetcher
from nomatmul.hardware.rtl.gearbox import Gearbox
from nomatmul.hardware.rtl.guard import Guard
from nomatmul.hardware.rtl.host import Host
from nomatmul.hardware.rtl.loader import Loader
from nomatmul.hardware.rtl.machine_state import Phase
from nomatmul.hardware.rtl.products import ProductUnit
from nomatmul.hardware.rtl.row_unit import RowUnit
from nomatmul.hardware.rtl.scalar_unit import ScalarUnit
from nomatmul.hardware.rtl.sequencer import Sequencer
from nomatmul.hardware.rtl.streamer import Streamer
from nomatmul.hardware.rtl.tree_unit import TreeUnit
from nomatmul.hardware.rtl.vector_memory import ParameterMemory, VectorMemory
from nomatmul.hardware.rtl.vector_unit import VectorUnit
from nomatmul.hardware.rtl.wishbone import Wishbone


class Accelerator(wiring.Component):
    """`memory` asks for words, `bus` is the host's (hardware/registers.py); `probe` if the design
    has one. `reset`, for 20 cycles at least, is the reset of a clock domain that has none of its
    own: where it has one, a LUT joins it with each unit's reset, between two long wires.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        members = {
            "memory": Out(ports.MemoryPort(design.memory_bits)),
            "bus": In(Wishbone(registers.ADDRESS_BITS)),
            "reset": In(1),
        }
        if design.probe:
            members["probe"] = Out(probe.Probe(design))
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        self.guard, self.host, self.counters = Guard(design), Host(design), Counters()
        self.last_held = self.reset
        for name in ("guard", "host", "counters"):
            m.submodules[name] = ResetInserter(self._held(m, name))(getattr(self, name))
        units: dict[str, Elaboratable] = {
            "sequencer": Sequencer(design),
            "streamer": Streamer(design),
            "weights": Gearbox(design.memory_bits, design.beat_bits),
            "loader": Loader(design),
            "product": ProductUnit(design),
            "row": RowUnit(design),
            "vector": VectorUnit(design),
            "scalar": ScalarUnit(),
            "vectors": VectorMemory(design),
            "parameters": ParameterMemory(design),
        }
        if design.trees:
            units |= {
                "tree": TreeUnit(design),
                "fetcher": RowFetcher(design),
                "arbiter": Arbiter(design, 2),
            }
        self.units = units
        self.last_held = self.guard.hold | self.last_held
        for name, unit in units.items():
            setattr(self, name, unit)
            m.submodules[name] = ResetInserter(self._held(m, name))(unit)
        self._choose(m)
        self._memory(m)
        self._stream(m)
        self._sums(m)
        self._vectors(m)
        self._host(m)
        self._count(m)
        if design.probe:
            self._probe(m)
        return m

    def _held(self, m: Module, name: str) -> Signal:
        """A reset of its own for each unit, a cycle behind the one before: one register cannot
        drive all, and synthesis would merge equal ones. Nothing moves between two of them, since
        the last says when the host may start.
        """
        held = Signal(name=f"{name}_held", init=1)
        m.d.sync += held.eq(self.last_held)
        self.last_held = held
        return held

    def _choose(self, m: Module) -> None:
        """Which unit has the shared ones, from the opcode."""
        self.by_vector, self.by_loader, self.by_tree = Signal(), Signal(), Signal()
        word = self.sequencer.opcode
        m.d.sync += [
            self.by_vector.eq(commands.is_a(word, *commands.VECTOR_KINDS)),
            self.by_loader.eq(commands.is_a(word, isa.Embed)),
            self.by_tree.eq(commands.is_a(word, isa.Walk, isa.Combine)),
        ]

    def _memory(self, m: Module) -> None:
        connect(m, self.guard.memory, flipped(self.memory))
        if self.design.trees:
            connect(m, self.streamer.memory, self.arbiter.readers[0])
            connect(m, self.fetcher.memory, self.arbiter.readers[1])
            connect(m, self.arbiter.memory, self.guard.units)
            connect(m, self.tree.fetch, self.fetcher.command)
            connect(m, self.fetcher.words, self.tree.words)
        else:
            connect(m, self.streamer.memory, self.guard.units)
        connect(m, self.sequencer.read, self.streamer.command)

    def _stream(self, m: Module) -> None:
        """Words go to whoever has a region to take: gearboxes take none without."""
        sequencer, words, loader = self.sequencer, self.streamer.words, self.loader.words
        weights = self.weights.words
        connect(m, sequencer.load, self.loader.command)
        connect(m, self.weights.output, self.product.beats)
        m.d.comb += [
            loader.payload.eq(words.payload),
            loader.valid.eq(words.valid),
            words.ready.eq(loader.ready | (weights.ready & ~self.by_tree)),
        ]
        if self.design.trees:
            tree, own = self.tree, self.by_tree
            fetched = tree.product_words
            m.d.comb += [
                weights.payload.eq(Mux(own, fetched.payload, words.payload)),
                weights.valid.eq(Mux(own, fetched.valid, words.valid)),
                fetched.ready.eq(weights.ready & own),
            ]
            join(m, self.weights.command, (~own, sequencer.weights), (own, tree.region))
            join(m, self.product.command, (~own, sequencer.product), (own, tree.product))
            connect(m, sequencer.walk, tree.walk)
            connect(m, sequencer.combine, tree.combine)
        else:
            m.d.comb += [weights.payload.eq(words.payload), weights.valid.eq(words.valid)]
            connect(m, sequencer.weights, self.weights.command)
            connect(m, sequencer.product, self.product.command)

    def _sums(self, m: Module) -> None:
        """Sums to the row unit, and what they are to become."""
        row, sums = self.row, self.product.sums
        of_product = ~(self.by_tree | self.by_loader)
        sources = [(of_product, sums), (self.by_loader, self.loader.sums)]
        if self.design.trees:
            # WALK sees the product's sums first; COMBINE has sums of its own
            sources.append((self.by_tree, self.tree.results))
            m.d.comb += [
                self.tree.sums.payload.eq(sums.payload),
                self.tree.sums.valid.eq(sums.valid & self.by_tree),
            ]
            own = self.by_tree
            join(m, row.command, (~own, self.sequencer.row), (own, self.tree.row))
        else:
            connect(m, self.sequencer.row, row.command)
        join(m, row.sums, *sources)
        if self.design.trees:
            with m.If(self.by_tree):
                m.d.comb += sums.ready.eq(self.tree.sums.ready)

    def _vectors(self, m: Module) -> None:
        """The memories: read by the vector unit or the row unit, which never run at once."""
        vector, row = self.vector, self.row
        connect(m, self.sequencer.vector, vector.command)
        connect(m, vector.result, self.sequencer.vector_result)
        connect(m, self.sequencer.scalar, self.scalar.command)
        connect(m, self.scalar.result, self.sequencer.scalar_result)
        connect(m, self.loader.scale, self.sequencer.embed_scale)
        connect(m, row.vector_write, self.vectors.write)
        for memory, for_vector, for_row in (
            (self.vectors.read, vector.vector, row.vector_read),
            (self.parameters.read, vector.parameter, row.parameter_read),
        ):
            m.d.comb += [
                memory.address.eq(Mux(self.by_vector, for_vector.address, for_row.address)),
                memory.enable.eq(Mux(self.by_vector, for_vector.enable, for_row.enable)),
                for_vector.data.eq(memory.data),
                for_row.data.eq(memory.data),
            ]
        writes, written = self.parameters.write, [self.loader.parameter]
        users = [self.product.activation]
        if self.design.trees:
            written.append(self.tree.parameter)
            users.append(self.tree.activation)
        for name in ("valid", "address", "mask", "data"):
            value = getattr(written[0], name)
            if len(written) == 2:
                value = Mux(self.by_tree, getattr(written[1], name), value)
            m.d.comb += getattr(writes, name).eq(value)
        for user in users:
            for name in ("valid", "address", "data"):
                m.d.comb += getattr(user, name).eq(getattr(vector.activation, name))

    def _host(self, m: Module) -> None:
        host, sequencer, row = self.host, self.sequencer, self.row
        connect(m, flipped(self.bus), host.bus)
        connect(m, host.program, sequencer.program)
        connect(m, host.token, sequencer.token)
        silent = sequencer.token_now.argmax_only
        faults = {
            Status.ILLEGAL_CODE: self.product.illegal,
            Status.MEMORY_ERROR: self.guard.error,
            Status.SATURATED: row.saturated.any(),
            Status.BAD_INSTRUCTION: sequencer.faults.bad_instruction,
            Status.EXPONENT: sequencer.faults.exponent | self.vector.exponent,
            Status.BAD_TOKEN: sequencer.faults.bad_token,
            Status.WATCHDOG: sequencer.faults.watchdog,
        }
        if self.design.trees:
            faults[Status.ILLEGAL_CODE] |= self.tree.illegal
            faults[Status.BAD_INSTRUCTION] |= self.tree.refused
        for flag, event in faults.items():
            m.d.sync += host.faults[int(flag).bit_length() - 1].eq(event)
        m.d.sync += [
            host.hold.eq(host.resetting),
            host.halted.eq(sequencer.halted),  # not before its cause is in STATUS
            host.taken.eq(sequencer.retired & commands.is_a(sequencer.opcode, isa.Token)),
        ]
        m.d.comb += [
            sequencer.run.eq(host.run & ~host.hold),
            host.logits.payload.eq(row.logits.payload.value),
            host.logits.valid.eq(row.logits.valid & ~silent),
            row.logits.ready.eq(host.logits.ready | silent),
            host.argmax.eq(row.argmax),
            host.pc.eq(sequencer.pc),
            host.waiting.eq(sequencer.phase == Phase.TOKEN),
            host.resetting.eq(self.guard.hold | self.last_held),
            host.answered.eq(sequencer.answered),
            self.guard.reset.eq(host.reset),
        ]

    def _count(self, m: Module) -> None:
        """What the counters and the watchdog see, behind registers."""
        counters, row, words = self.counters, self.row, self.streamer.words
        busy = [unit.busy for unit in (self.product, row, self.loader)]
        beats = self.weights.output
        short = self.weights.busy & beats.ready & (self.streamer.level <= 1)
        starved = (short | (words.ready & ~words.valid)) & ~beats.valid
        if self.design.trees:
            busy.append(self.tree.busy)
            starved |= self.by_tree & self.fetcher.busy & ~self.fetcher.words.valid
        m.d.sync += [
            self.sequencer.busy.eq(Cat(busy).any()),
            self.sequencer.progress.eq(self.guard.word | counters.beat | row.logits.valid),
            counters.beat.eq(beats.valid & beats.ready),
            counters.starved.eq(starved),
            counters.logits.eq(row.logits.valid & ~row.logits.ready),
            counters.retired.eq(self.sequencer.retired),
            counters.saturated.eq(row.saturated.any()),
        ]
        m.d.comb += [
            counters.phase.eq(self.sequencer.phase),
            counters.word.eq(self.guard.word),
            counters.freeze.eq(self.host.freeze),
            counters.clear.eq(self.host.clear),
            self.host.counters.eq(counters.values),
        ]

    def _probe(self, m: Module) -> None:
        seen, sequencer, row = self.probe, self.sequencer, self.row
        scalar = sequencer.scalar_write
        probe.copy(m, seen.vector, row.vector_write, "address", "data")
        probe.copy(m, seen.state, row.state_write, "address", "data")
        probe.copy(m, seen.parameter, self.parameters.write, "address", "mask", "data")
        probe.copy(m, seen.activation, self.vector.activation, "address", "data")
        m.d.comb += [
            seen.scalar.valid.eq(scalar.valid),
            seen.scalar.address.eq(scalar.address),
            seen.scalar.m.eq(scalar.value.m),
            seen.scalar.e.eq(scalar.value.e),
            seen.logit.valid.eq(row.logits.valid & row.logits.ready),
            seen.logit.value.eq(row.logits.payload.value),
            seen.logit.last.eq(row.logits.payload.last),
            seen.retired.valid.eq(sequencer.retired),
            seen.retired.index.eq(sequencer.pc),
        ]


def join(m: Module, sink: Any, *sources: tuple[Value, Any]) -> None:
    """One stream of several, of which the chosen one is the only one that counts."""
    chosen, first = sources[0]
    payload, valid = first.payload, first.valid & chosen
    m.d.comb += first.ready.eq(sink.ready & chosen)
    for chosen, source in sources[1:]:
        payload = Mux(chosen, source.payload, payload)
        valid |= source.valid & chosen
        m.d.comb += source.ready.eq(sink.ready & chosen)
    m.d.comb += [sink.payload.eq(payload), sink.valid.eq(valid)]
