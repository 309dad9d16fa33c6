"""The host's side: registers behind a Wishbone slave, and the queues of tokens and logits.

The registers are those of hardware/registers.py. A read passes four registers (which, its group in
two steps, the word), so an access takes four cycles; it never waits for the machine. Writing a full
token queue and reading an empty logit queue are flagged and do nothing.
"""

from amaranth import Array, Cat, Const, Module, Mux, ResetInserter, Shape, Signal, Value, signed
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import registers
from nomatmul.hardware.design import Design
from nomatmul.hardware.registers import Control, Register, Status
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.machine_state import TokenEntry
from nomatmul.hardware.rtl.pipeline import register
from nomatmul.hardware.rtl.program import PARTS, ProgramWrite
from nomatmul.hardware.rtl.wishbone import Wishbone

_COUNT_BITS = 32
_COUNTER_REGISTERS = 2 * len(registers.COUNTERS)


def _bit(flag: int) -> int:
    return flag.bit_length() - 1


def _chosen(m: Module, values: list[Value], index: Value, name: str) -> Signal:
    """values[index], or 0 behind the last, two cycles later: out of four, then of what is left."""
    groups = [
        register(m, Array([*values[k : k + 4], *[Const(0, 1)] * 3])[index[:2]], f"{name}{k}")
        for k in range(0, len(values), 4)
    ]
    missing = (1 << len(index[2:])) - len(groups)
    return register(m, Array([*groups, *[Const(0, 1)] * missing])[index[2:]], name)


class Host(wiring.Component):
    """`faults` are pulses in the order of registers.Status. `hold` empties the queues while the
    units are reset, a cycle behind `resetting`; `reset`, `run`, `clear` pulse.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "bus": In(Wishbone(registers.ADDRESS_BITS)),
                "program": Out(ProgramWrite(design)),
                "token": Out(stream.Signature(TokenEntry)),
                "logits": In(stream.Signature(signed(design.vector_bits))),
                "argmax": In(ports.argmax(design)),
                "pc": In(range(design.program_words)),
                "counters": In(data.ArrayLayout(registers.COUNTER_HALF, _COUNTER_REGISTERS)),
                "faults": In(registers.FAULTS),
                "halted": In(1, init=1),
                "waiting": In(1),
                "hold": In(1),
                "resetting": In(1),
                "taken": In(1),
                "answered": In(1),
                "run": Out(1),
                "reset": Out(1),
                "freeze": Out(1),
                "clear": Out(1),
            }
        )
        self._address = Signal(registers.ADDRESS_BITS)
        self._data = Signal(32)
        self._begin = Signal()  # of an access, the cycle before those
        self._lost, self._underrun = Signal(), Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        token_room = self._tokens(m)
        waiting, logit = self._logits(m)
        status = self._status(m, token_room)
        self._control(m)
        self._program(m)
        answers, tokens = Signal(_COUNT_BITS), Signal(_COUNT_BITS)
        m.d.sync += [answers.eq(answers + self.answered), tokens.eq(tokens + self.taken)]
        with m.If(self.hold):
            m.d.sync += [answers.eq(0), tokens.eq(0)]
        control = Cat(~self.halted, Const(0, 1), self.freeze)
        values: dict[int, Value] = {
            Register.VERSION: Const(registers.VERSION, 32),
            Register.CONTROL: control,
            Register.STATUS: status,
            Register.LOGIT: logit,
            Register.LOGITS_WAITING: waiting,
            Register.ARGMAX: self.argmax.index,
            Register.ARGMAX_VALUE: self.argmax.value,
            Register.ANSWERS: answers,
            Register.PC: self.pc,
            Register.TOKENS: tokens,
        }
        self._answer(m, values)
        return m

    def _answer(self, m: Module, values: dict[int, Value]) -> None:
        """The bus: an access is kept, acted on a cycle later, its answer chosen in three steps."""
        bus, at, stage = self.bus, self._address, Signal(4)
        low = at[: _bit(Register.COUNTERS)]
        begin = self._begin
        m.d.comb += begin.eq(bus.cyc & bus.stb & (stage == 0) & ~bus.ack)
        m.d.sync += [
            stage.eq(Cat(begin, stage)),
            bus.ack.eq(stage[2] & bus.cyc & bus.stb),
        ]
        with m.If(begin):
            m.d.sync += [at.eq(bus.adr), self._data.eq(bus.dat_w)]
        first = _chosen(m, [values.get(k, Const(0, 1)) for k in range(16)], at[:4], "first")
        counters = _chosen(m, list(self.counters), low, "counters")
        words = [Const(word, 32) for word in registers.design_words(self.design)]
        design = _chosen(m, words, low, "design")
        page = at >> _bit(Register.COUNTERS)
        of_design = Register.DESIGN // Register.COUNTERS
        pages = {"first": at[4:] == 0, "counters": page == 1, "design": page == of_design}
        chosen = {name: register(m, here, f"in_{name}") for name, here in pages.items()}
        m.d.sync += bus.dat_r.eq(0)
        for name, value in (("first", first), ("counters", counters), ("design", design)):
            with m.If(chosen[name]):
                m.d.sync += bus.dat_r.eq(value)

    def _accessed(self, m: Module, register: Register, *, write: bool) -> Signal:
        """A pulse beside the access's address and data, found in the cycle before."""
        pulse = Signal(name=f"{'write' if write else 'read'}_{register.name.lower()}")
        bus = self.bus
        m.d.sync += pulse.eq(self._begin & (bus.we == write) & (bus.adr == register))
        return pulse

    def _tokens(self, m: Module) -> Signal:
        width = Shape.cast(TokenEntry).width
        queue = fifo.SyncFIFO(width=width, depth=registers.TOKEN_QUEUE)
        m.submodules.tokens = ResetInserter(self.hold)(queue)
        flags = registers.TokenFlag
        entry, room = Signal(TokenEntry), Signal()
        written = self._accessed(m, Register.TOKEN, write=True)
        m.d.comb += [
            room.eq(queue.w_rdy & ~self.hold),  # a queue in reset would lose it without a flag
            entry.id.eq(self._data),
            entry.argmax_only.eq(self._data[_bit(flags.ARGMAX_ONLY)]),
            entry.fresh.eq(self._data[_bit(flags.FRESH)]),
            entry.want_logits.eq(self._data[_bit(flags.WANT_LOGITS)]),
            queue.w_data.eq(entry),
            queue.w_en.eq(written & room),
            self._lost.eq(written & ~room),
            self.token.valid.eq(queue.r_rdy),
            self.token.payload.eq(queue.r_data),
            queue.r_en.eq(self.token.ready),
        ]
        return room

    def _logits(self, m: Module) -> tuple[Signal, Signal]:
        """How many wait, and the next one; reading it takes it."""
        queue = Fifo(signed(self.design.vector_bits), registers.LOGIT_QUEUE)
        m.submodules.logits = ResetInserter(self.hold)(queue)
        wiring.connect(m, wiring.flipped(self.logits), queue.input)
        reads = self._accessed(m, Register.LOGIT, write=False)
        m.d.comb += [
            queue.output.ready.eq(reads),
            self._underrun.eq(reads & ~queue.output.valid),
        ]
        return queue.level, Mux(queue.output.valid, queue.output.payload, 0)

    def _status(self, m: Module, token_room: Signal) -> Signal:
        sticky, events = Signal(registers.FAULTS), Signal(registers.FAULTS)
        own = {Status.TOKEN_LOST: self._lost, Status.LOGIT_UNDERRUN: self._underrun}
        m.d.comb += events.eq(self.faults)
        for flag, event in own.items():
            with m.If(event):
                m.d.comb += events[_bit(flag)].eq(1)
        written = self._accessed(m, Register.STATUS, write=True)
        cleared = Mux(written, self._data[: registers.FAULTS], 0)
        m.d.sync += sticky.eq((sticky & ~cleared) | events)
        status = Signal(32)
        m.d.comb += [
            status[: registers.FAULTS].eq(sticky),
            status[_bit(Status.HALTED)].eq(self.halted),
            status[_bit(Status.WAITING)].eq(self.waiting),
            status[_bit(Status.TOKEN_ROOM)].eq(token_room),
            status[_bit(Status.RESETTING)].eq(self.resetting | self.hold),
        ]
        return status

    def _control(self, m: Module) -> None:
        written = self._accessed(m, Register.CONTROL, write=True)
        m.d.sync += [
            self.run.eq(written & self._data[_bit(Control.RUN)]),
            self.reset.eq(written & self._data[_bit(Control.RESET)]),
            self.clear.eq(written & self._data[_bit(Control.CLEAR)]),
        ]
        with m.If(written):
            m.d.sync += self.freeze.eq(self._data[_bit(Control.FREEZE)])

    def _program(self, m: Module) -> None:
        """Four words make an instruction; then the address goes on by one."""
        at, part = self.program.address, self.program.part
        written = self._accessed(m, Register.PROGRAM_DATA, write=True)
        m.d.sync += self.program.valid.eq(written)
        m.d.sync += self.program.data.eq(self._data)
        with m.If(self.program.valid):
            m.d.sync += part.eq(part + 1)
            with m.If(part == PARTS - 1):
                m.d.sync += at.eq(at + 1)
        with m.If(self._accessed(m, Register.PROGRAM_ADDRESS, write=True)):
            m.d.sync += [at.eq(self._data), part.eq(0)]
