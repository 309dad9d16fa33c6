"""The sequencer: one instruction at a time, from the program to the units and back.

    halted -> fetch -> read -> latch -> check -> (address, beats) -> dispatch -> wait -> retire
                        ^--------------------------------------------------------------'

`check` asks the instruction's ranges and reads its scalar registers meanwhile. `dispatch` offers
the commands that the opcode calls for, each until it is taken; `wait` lasts until every unit has
written what it had to. An instruction that is none, or says what the design has not, halts the
machine with a flag; so does the watchdog, when nothing moves.

Legend: a scalar is m * 2^e of 24 and 10 bits; `word` is the instruction that runs, `pc` where it
stands.
"""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import isa, registers
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import commands, ports
from nomatmul.hardware.rtl.checks import Checker, field
from nomatmul.hardware.rtl.machine_state import Faults, Phase, TokenEntry
from nomatmul.hardware.rtl.program import (
    ProgramMemory,
    ProgramWrite,
    ScalarRegisters,
    ScalarWrite,
)
from nomatmul.hardware.rtl.watchdog import Watchdog

_SETTLE = 1  # cycles from the taking of a command until its unit surely says that it is busy


class Sequencer(wiring.Component):
    """Ports: `run` starts at instruction 0; `busy` is that of all units (not of the streamer);
    `progress` says that something moved, for the watchdog. Commands and results are those of the
    units; `embed_scale` is the scale that the embedding unit found. `retired` pulses with `pc`
    after all writes of the instruction. `answered` pulses when a token's logits are all done.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        members = {
            "run": In(1),
            "halted": Out(1, init=1),
            "program": In(ProgramWrite(design)),
            "token": In(stream.Signature(TokenEntry)),
            "token_now": Out(TokenEntry),
            "busy": In(1),
            "progress": In(1),
            "vector_result": In(stream.Signature(ports.Scalar)),
            "scalar_result": In(stream.Signature(ports.ScalarResult)),
            "embed_scale": In(stream.Signature(ports.Scalar)),
            "scalar_write": Out(ScalarWrite()),
            "phase": Out(Phase),
            "faults": Out(Faults),
            "pc": Out(range(design.program_words)),
            "retired": Out(1),
            "answered": Out(1),
            "opcode": Out(isa.OPCODE_BITS),
        }
        for name, payload in commands.of(design).items():
            members[name] = Out(stream.Signature(payload))
        super().__init__(members)
        self._read = Signal(isa.INSTRUCTION_BITS, reset_less=True)  # the block RAMs' own register
        self._word = Signal(isa.INSTRUCTION_BITS, reset_less=True)
        self._operands = [
            Signal(ports.Scalar, name=f"operand{k}", reset_less=True)
            for k in range(ports.MAX_SLOTS)
        ]
        self._step = Signal(5)  # of check: since its beginning
        self._product = Signal(32, reset_less=True)
        self._address = Signal(32, reset_less=True)
        self._multiplied = Signal()  # product and address are there
        self._beats = Signal(ports.BEAT_BITS, reset_less=True)
        self._next_pc = Signal(range(design.program_words + 1))
        self._expired = Signal()
        self._streams = {name: getattr(self, name) for name in commands.of(design)}
        self._pending = Signal(len(self._streams))
        self._given = Signal(len(self._streams))  # what this opcode gives
        self._kinds: dict[tuple[type[isa.Instruction], ...], Signal] = {}

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = ProgramMemory(self.design)
        m.submodules.registers = scalars = ScalarRegisters()
        m.submodules.checker = checker = Checker(self.design)
        wiring.connect(m, wiring.flipped(self.program), memory.write)
        m.d.comb += [
            memory.address.eq(self._next_pc),
            checker.word.eq(self._word),
            self.opcode.eq(self._word[: isa.OPCODE_BITS]),
            scalars.write.valid.eq(self.scalar_write.valid),
            scalars.write.address.eq(self.scalar_write.address),
            scalars.write.value.eq(self.scalar_write.value),
        ]
        self._read_operands(m, scalars)
        self._multiply(m)
        payloads = {name: each.payload for name, each in self._streams.items()}
        commands.connect(m, payloads, self._sources())
        for each, bit in zip(self._streams.values(), self._pending, strict=True):
            m.d.comb += each.valid.eq(bit)
        self._states(m, memory, checker)
        for kinds, known in self._kinds.items():
            m.d.sync += known.eq(commands.is_a(self._read, *kinds))
        return m

    def _sources(self) -> commands.Sources:
        return commands.Sources(
            self._word,
            self._is(isa.Embed),
            self._operands,
            self.token_now.fresh,
            self._product,
            self._address,
            self._beats,
        )

    def _is(self, *kinds: type[isa.Instruction]) -> Value:
        """Whether the instruction is one of these, from a register that moves with `word`."""
        if kinds not in self._kinds:
            self._kinds[kinds] = Signal(name="is_" + "_".join(k.name.lower() for k in kinds))
        return self._kinds[kinds]

    def _read_operands(self, m: Module, scalars: ScalarRegisters) -> None:
        """Steps 0, 1, 2 choose the operands' registers; each is here two cycles later."""
        names = {
            **dict.fromkeys((isa.Smul, isa.Sadd, isa.Sdiv), ("sa", "sb")),
            **dict.fromkeys((isa.Ssqrt, isa.Sumsq), ("sa",)),
            isa.Quant: ("sa", "sr"),
            **dict.fromkeys((isa.Product, isa.Walk, isa.Combine), ("m",)),
        }
        at = scalars.address
        chosen = Signal(5, reset_less=True)
        m.d.sync += chosen.eq(at)
        m.d.comb += at.eq(chosen)
        with m.If(self._step == 2):
            m.d.sync += chosen.eq(chosen + 1)
        alike: dict[tuple[int, ...], list[type[isa.Instruction]]] = {}  # by where the fields lie
        for kind, fields in names.items():
            places = tuple(isa.layout(kind)[name].low for name in fields)
            alike.setdefault(places, []).append(kind)
        for step in range(2):
            for kinds in alike.values():
                fields = names[kinds[0]]
                with m.If((self._step == step) & self._is(*kinds)):
                    m.d.sync += chosen.eq(chosen + 1)
                    if step < len(fields):
                        m.d.sync += chosen.eq(field(self._word, kinds[0], fields[step]))
        for k, operand in enumerate(self._operands):
            with m.If(self._step == k + 2):
                m.d.sync += operand.eq(scalars.value)

    def _multiply(self, m: Module) -> None:
        """rows * beats, or token * stride, a bit of the second a cycle from step 2 on."""
        width = isa.layout(isa.Embed)["stride"].width
        top = width - isa.layout(isa.Product)["beats"].width
        embeds = self._is(isa.Embed)
        factor, more = Signal(width, reset_less=True), Signal(registers.TOKEN_BITS, reset_less=True)
        left = Signal(range(width + 1))
        beats = field(self._word, isa.Product, "beats") << top
        with m.If(self._step == 1):
            m.d.sync += [
                factor.eq(Mux(embeds, field(self._word, isa.Embed, "stride"), beats)),
                more.eq(Mux(embeds, self.token_now.id, field(self._word, isa.Product, "rows"))),
                left.eq(Mux(embeds, width, width - top)),
                self._product.eq(0),
            ]
        with m.Elif(left != 0):
            m.d.sync += [
                left.eq(left - 1),
                factor.eq(factor << 1),
                self._product.eq((self._product << 1) + Mux(factor[-1], more, 0)),
            ]
        m.d.sync += [
            self._address.eq(self._product + field(self._word, isa.Embed, "base")),
            self._multiplied.eq((left == 0) & (self._step > 2)),
        ]

    def _states(self, m: Module, memory: ProgramMemory, checker: Checker) -> None:
        """The life of an instruction; see the top of the file."""
        bad, settle = Signal(), Signal(range(_SETTLE + 1))
        left = self._pending & ~Cat(each.ready for each in self._streams.values())
        m.d.sync += self._given.eq(0)
        with m.Switch(self.opcode):
            for kind, names in commands.GIVEN.items():
                if set(names) <= set(self._streams):
                    with m.Case(kind.opcode):
                        m.d.sync += self._given.eq(self._mask(*names))
        m.d.comb += self.faults.bad_instruction.eq(bad)
        m.d.sync += self.scalar_write.valid.eq(0)
        self._scalar_value(m)
        m.d.sync += self._step.eq(self._step + ~self._step.all())
        with m.FSM(init="HALTED") as fsm:
            m.d.comb += self.halted.eq(fsm.ongoing("HALTED"))
            with m.State("HALTED"):
                m.d.sync += [self._pending.eq(0), self._next_pc.eq(0)]
                with m.If(self.run):
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.d.sync += self.pc.eq(0)
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += self._read.eq(memory.word)
                m.next = "LATCH"
            with m.State("LATCH"):
                m.d.sync += [self._word.eq(self._read), self._step.eq(0)]
                m.next = "START"
            with m.State("START"):
                m.d.comb += checker.start.eq(1)
                m.d.sync += self._next_pc.eq(self.pc + 1)
                m.next = "CHECK"
            with m.State("CHECK"), m.If(checker.done):
                m.next = "DECIDE"
            with m.State("DECIDE"):
                self._decide(m, checker.bad, bad)
            if self.design.trees:
                with m.State("DIVIDE"):
                    self._divide(m)
            with m.State("DISPATCH"):
                m.d.sync += [self._pending.eq(left), settle.eq(_SETTLE)]
                with m.If(self._pending == 0):
                    self._after_dispatch(m)
                self._give_up(m)
            with m.State("SCALE"):
                m.d.comb += self.embed_scale.ready.eq(1)
                with m.If(self.embed_scale.valid):
                    m.d.sync += [
                        self._operands[0].eq(self.embed_scale.payload),
                        self._pending.eq(self._mask("row")),
                    ]
                    m.next = "DISPATCH"
                self._give_up(m)
            with m.State("RESULT"):
                self._take_result(m)
                self._give_up(m)
            with m.State("SETTLE"):
                m.d.sync += settle.eq(settle - 1)
                with m.If(settle == 0):
                    m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(~self.busy):
                    m.next = "RETIRE"
                self._give_up(m)
            self._token_states(m)
            with m.State("RETIRE"):
                self._retire(m, bad)
        self._watch(m, fsm)

    def _give_up(self, m: Module) -> None:
        """Halt where nothing has moved for long; the units then need a reset."""
        with m.If(self._expired):
            m.d.comb += self.faults.watchdog.eq(1)
            m.next = "HALTED"

    def _mask(self, *names: str) -> int:
        assert set(names) <= set(self._streams)
        return sum(1 << k for k, name in enumerate(self._streams) if name in names)

    def _decide(self, m: Module, is_bad: Value, bad: Signal) -> None:
        """The check is over: which way the instruction goes."""
        counts = self._is(isa.Embed, isa.Product, isa.Combine)
        with m.If(is_bad):
            m.d.comb += bad.eq(1)
            m.next = "HALTED"
        with m.Elif(self._is(isa.Halt)):
            m.next = "HALTED"
        with m.Elif(self._is(isa.Token)):
            m.next = "TOKEN"
        with m.Elif(self._is(isa.Jump) | (self._is(isa.Skip) & ~self.token_now.want_logits)):
            m.d.sync += self._next_pc.eq(field(self._word, isa.Jump, "target"))
            m.next = "RETIRE"
        with m.Elif(self._is(isa.Skip)):
            m.next = "RETIRE"
        with m.Elif(self._is(isa.Sconst)):
            m.d.sync += self.scalar_write.valid.eq(1)
            m.next = "RETIRE"
        if self.design.trees:
            with m.Elif(self._is(isa.Combine) & self._multiplied):
                m.d.sync += self._product.eq(field(self._word, isa.Combine, "rows"))
                m.d.sync += self._beats.eq(0)
                m.next = "DIVIDE"
        with m.Elif(~counts | (~self._is(isa.Combine) & self._multiplied)):
            self._dispatch(m)

    def _dispatch(self, m: Module) -> None:
        """Offer the commands that the opcode gives."""
        m.d.sync += self._pending.eq(self._given)
        m.next = "DISPATCH"

    def _divide(self, m: Module) -> None:
        """Beats of a record's rows: lanes are taken off until none are left."""
        m.d.sync += [
            self._product.eq(self._product - self.design.lanes),
            self._beats.eq(self._beats + 1),
        ]
        with m.If(self._product <= self.design.lanes):
            self._dispatch(m)

    def _after_dispatch(self, m: Module) -> None:
        scaled = Signal()
        with m.If(self._is(isa.Stream)):
            m.next = "RETIRE"
        with m.Elif(self._is(*commands.SCALAR_KINDS, *commands.VECTOR_KINDS)):
            m.next = "RESULT"
        with m.Elif(self._is(isa.Embed) & ~scaled):
            m.d.sync += scaled.eq(1)
            m.next = "SCALE"
        with m.Else():
            m.d.sync += scaled.eq(0)
            m.next = "SETTLE"

    def _scalar_value(self, m: Module) -> None:
        """What the instruction would write, in every cycle: the states say when it counts."""
        scalar, vector = self.scalar_result.payload, self.vector_result.payload
        write = self.scalar_write
        m.d.sync += write.address.eq(field(self._word, isa.Sconst, "sd"))
        for name in ("m", "e"):
            found = Mux(self._is(*commands.SCALAR_KINDS), scalar[name], vector[name])
            own = field(self._word, isa.Sconst, name)
            m.d.sync += write.value[name].eq(Mux(self._is(isa.Sconst), own, found))

    def _take_result(self, m: Module) -> None:
        """All instructions with a result have `sd` where SCONST has it; QUANT's says only that it
        is done.
        """
        scalar, vector = self.scalar_result, self.vector_result
        m.d.comb += [scalar.ready.eq(1), vector.ready.eq(1)]
        with m.If(scalar.valid):
            m.d.sync += self.scalar_write.valid.eq(1)
            m.d.comb += self.faults.exponent.eq(scalar.payload.flag)
            m.next = "RETIRE"
        with m.Elif(vector.valid):
            with m.If(~self._is(isa.Quant)):
                m.d.sync += self.scalar_write.valid.eq(1)
            m.next = "RETIRE"

    def _token_states(self, m: Module) -> None:
        beyond = Signal()
        with m.State("TOKEN"):
            m.d.comb += self.token.ready.eq(1)
            with m.If(self.token.valid):
                m.d.sync += self.token_now.eq(self.token.payload)
                m.next = "TOKEN_ASK"
        with m.State("TOKEN_ASK"):
            m.d.sync += beyond.eq(self.token_now.id >= field(self._word, isa.Token, "tokens"))
            m.next = "TOKEN_ANSWER"
        with m.State("TOKEN_ANSWER"):
            m.d.comb += self.faults.bad_token.eq(beyond)
            with m.If(beyond):
                m.next = "TOKEN"
            with m.Else():
                m.next = "RETIRE"

    def _retire(self, m: Module, bad: Signal) -> None:
        epilogue = field(self._word, isa.Product, "epilogue")
        logits = self._is(isa.Product) & (epilogue == isa.Epilogue.LOGITS)
        m.d.comb += [self.retired.eq(1), self.answered.eq(logits)]
        m.d.sync += self.pc.eq(self._next_pc)
        m.next = "READ"  # the address of the next one was there in this cycle
        with m.If(self._next_pc == self.design.program_words):
            m.d.comb += bad.eq(1)  # it ran out of the program's memory
            m.next = "HALTED"

    def _watch(self, m: Module, fsm: object) -> None:
        """Phases for the counters, and the end of an instruction that does not end."""
        working = Signal()
        states = ("DISPATCH", "SCALE", "RESULT", "SETTLE", "WAIT")
        m.d.comb += working.eq(Cat(fsm.ongoing(state) for state in states).any())
        m.submodules.watchdog = watchdog = Watchdog()
        m.d.comb += [
            watchdog.fed.eq(self.progress | ~working),
            self._expired.eq(watchdog.expired),
        ]
        m.d.sync += self.phase.eq(Phase.CONTROL)
        with m.If(Cat(fsm.ongoing(s) for s in ("TOKEN", "TOKEN_ASK", "TOKEN_ANSWER")).any()):
            m.d.sync += self.phase.eq(Phase.TOKEN)
        with m.If(working):
            with m.If(self._is(*commands.SCALAR_KINDS)):
                m.d.sync += self.phase.eq(Phase.SCALAR)
            with m.Elif(self._is(*commands.VECTOR_KINDS)):
                m.d.sync += self.phase.eq(Phase.VECTOR)
            with m.Elif(~self._is(isa.Stream)):
                m.d.sync += self.phase.eq(Phase.ROWS)
