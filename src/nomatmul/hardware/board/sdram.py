"""A controller of 16-bit SDRAM: a MemoryPort for weights, and single words for the host.

One row is open at a time and stays open until another one, or a refresh, is needed; sequential
reads cost a row change each 2^column_bits columns. Every column is a READ of burst length 1, so a
refresh can come between any two, and is never late. Data that come back carry a tag of the same
age through a shift register. Words leave through a FIFO; a word's first column is read only when
the FIFO has room for the word.

Chips are addressed {row, bank, column}. The host sees 32-bit words, low half first.

Legend: M bits of a memory word, C columns a word (M / 16), CL the CAS latency. `io_stages` counts
the registers between this component and the chip, there and back (those of the pins).
"""

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nomatmul.hardware.board.sdram_chip import SdramChip
from nomatmul.hardware.board.sdram_pins import Command, HostRequest, SdramPins
from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.pipeline import Skid
from nomatmul.hardware.rtl.ports import BURST_BITS, MemoryPort

_REFRESH_MARGIN = 40  # cycles that a refresh may come after it is due
_INIT_REFRESHES = 8
_ENABLED = 128  # bits of a wide register that one enable drives


class Sdram(wiring.Component):
    """`port` reads bursts; `host` reads or writes one 32-bit word; `ready` after initialisation.

    Raises ValueError for a clock or a width that the chip or the controller cannot have.
    """

    def __init__(
        self, memory_bits: int, chip: SdramChip, clock_hz: float, *, io_stages: int = 0
    ) -> None:
        if memory_bits % chip.data_bits or memory_bits & (memory_bits - 1):
            raise ValueError(
                f"memory_bits is {memory_bits}, not {chip.data_bits} times a power of two"
            )
        self.memory_bits = memory_bits
        self.per_word = memory_bits // chip.data_bits
        self.chip = chip
        self.clock_hz = clock_hz
        self.cas = chip.cas_latency(clock_hz)
        self.latency = self.cas + io_stages  # from a READ on `pins` to its data in `dq_i`
        interval = int(chip.refresh_interval_ns * clock_hz / 1e9)
        if interval <= 3 * _REFRESH_MARGIN:
            raise ValueError(
                f"{clock_hz / 1e6:g} MHz is too slow: refreshes are due every {interval} cycles"
            )
        self.refresh_period = interval - _REFRESH_MARGIN
        super().__init__(
            {
                "port": In(MemoryPort(memory_bits)),
                "host": In(self.host_signature()),
                "pins": Out(SdramPins(chip)),
                "ready": Out(1),
            }
        )

    @staticmethod
    def host_signature() -> wiring.Signature:
        """The host's side: one word asked, one answered for each that is read."""
        return wiring.Signature(
            {
                "request": Out(stream.Signature(HostRequest)),
                "response": In(stream.Signature(32)),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        self._timers(m)
        self._returns(m)
        self._commands(m)
        return m

    def _cycles(self, nanoseconds: float, least: int = 1) -> int:
        return max(least, self.chip.cycles(nanoseconds, self.clock_hz))

    # -- time -------------------------------------------------------------------------------------

    def _timers(self, m: Module) -> None:
        """Counters that hold commands back; each is loaded beside the command that starts it."""
        self.wait = Signal(range(64))  # nothing may be commanded
        self.row_wait = Signal(range(64))  # the row may not be closed
        self.cycle_wait = Signal(range(64))  # no row may be opened, nor refreshed
        # that each is over, in registers; who loads one says so here too
        self.may = Signal(init=1)
        self.row_over, self.cycle_over = Signal(init=1), Signal(init=1)
        for counter, over in (
            (self.wait, self.may),
            (self.row_wait, self.row_over),
            (self.cycle_wait, self.cycle_over),
        ):
            with m.If(counter != 0):
                m.d.sync += counter.eq(counter - 1)
            m.d.sync += over.eq(counter <= 1)
        self.refresh_timer = Signal(range(self.refresh_period), init=self.refresh_period - 1)
        self.refresh_due = Signal()
        with m.If(self.refresh_timer == 0):
            m.d.sync += [
                self.refresh_timer.eq(self.refresh_period - 1),
                self.refresh_due.eq(1),
            ]
        with m.Else():
            m.d.sync += self.refresh_timer.eq(self.refresh_timer - 1)

    def _give(self, m: Module, command: Command, wait_ns: float = 0.0, wait: int = 1) -> None:
        """Give `command` in the next cycle; the one after it comes `wait` cycles later at least."""
        cycles = self._cycles(wait_ns, wait)
        m.d.sync += [
            self.pins.command.eq(command),
            self.wait.eq(cycles - 1),
            self.may.eq(cycles == 1),
        ]

    # -- data that come back ----------------------------------------------------------------------

    def _returns(self, m: Module) -> None:
        """Tags age with their data; whole words go to the FIFO, the host's to its register."""
        chip, width = self.chip, self.chip.data_bits
        tag = data.StructLayout({"valid": 1, "host": 1, "end": 1, "error": 1, "last": 1})
        self.tag = Signal(tag)  # of the READ that is on the pins
        ages = [self.tag]
        for age in range(self.latency):
            ages.append(Signal(tag, name=f"tag_{age}"))
            m.d.sync += ages[-1].eq(ages[-2])
        # `column` is what the chip sent for `arrived`; its neighbours in wide registers get enables
        # of their own, so that none drives more than a part of them
        arrived = Signal(tag)
        column = Signal(width, reset_less=True)
        m.d.sync += [arrived.eq(ages[-1]), column.eq(Mux(ages[-1].error, 0, self.pins.dq_i))]
        self.in_flight = Signal()
        m.d.sync += self.in_flight.eq(Cat(age.valid for age in [*ages, arrived]).any())

        word = Signal(self.memory_bits, reset_less=True)
        wide = min(_ENABLED, self.memory_bits)
        for first in range(0, self.memory_bits, wide):
            shift = Signal(name=f"shift_{first}", attrs={"keep": 1})
            m.d.sync += shift.eq(ages[-1].valid & ~ages[-1].host)
            part = word[first : first + wide]
            above = column if first + wide == self.memory_bits else word[first + wide :][:width]
            with m.If(shift):
                m.d.sync += part.eq(Cat(part, above)[width:])
        done = Signal(tag)
        push = Signal()
        m.d.sync += [done.eq(arrived), push.eq(arrived.valid & ~arrived.host & arrived.end)]
        # in block RAM: in LUTs, an address would go to every bit of a word
        self.depth = 1 << ceil_log2(6 + -(-(self.latency + 3) // self.per_word))
        m.submodules.words = words = Fifo(self.memory_bits + 2, self.depth)
        # the pins hold the controller in a corner of the chip: registers on the way out of it
        m.submodules.onward = onward = Skid(self.memory_bits + 2)
        wiring.connect(m, words.output, onward.input)
        response = self.port.response
        m.d.comb += [
            words.input.valid.eq(push),
            words.input.payload.eq(Cat(word, done.error, done.last)),
            response.valid.eq(onward.output.valid),
            response.payload.as_value().eq(onward.output.payload),
            onward.output.ready.eq(response.ready),
        ]
        self.taken = Signal()
        m.d.comb += self.taken.eq(words.output.valid & words.output.ready)

        answer = self.host.response
        with m.If(answer.valid & answer.ready):
            m.d.sync += answer.valid.eq(0)
        with m.If(arrived.valid & arrived.host):
            m.d.sync += [
                answer.payload.eq(Cat(answer.payload, column)[width:]),
                answer.valid.eq(arrived.end),
            ]
        assert chip.data_bits == 16, "a host's word is two columns"

    # -- commands ---------------------------------------------------------------------------------

    def _commands(self, m: Module) -> None:
        chip = self.chip
        pins = self.pins
        m.d.sync += [pins.command.eq(Command.NOP), self.tag.valid.eq(0), pins.dq_oe.eq(0)]
        m.d.comb += [pins.cke.eq(1), pins.cs.eq(1), pins.dqm.eq(0)]

        # what is being served, and the row that is open
        self.place = Signal(chip.column_bits + chip.bank_bits + chip.row_bits)  # in columns
        self.column = self.place[: chip.column_bits]
        self.row = self.place[chip.column_bits :]  # {row, bank}
        # of a column, unless a state says otherwise; bit 10 stays 0: no automatic precharge
        m.d.sync += [pins.a.eq(self.column), pins.ba.eq(self.row[: chip.bank_bits])]
        self.open = Signal()
        self.open_row = Signal(chip.bank_bits + chip.row_bits)
        self.same_row = Signal()
        m.d.sync += self.same_row.eq(self.row == self.open_row)
        self.busy = Signal()
        self.for_host = Signal()
        self.write = Signal()
        self.write_data = Signal(32)
        self.host_next = Signal()
        self.words_left = Signal(BURST_BITS)  # less one
        self.part = Signal(range(max(2, self.per_word)))  # column of the word
        self.beyond = Signal()  # the word lies behind the chip's last
        self.end = Signal(init=self.per_word == 1)  # `part` is the last of its word
        self.begins = Signal(init=1)  # `part` is the first
        self.starts = Signal()  # a word's first column was read in the cycle before
        m.d.sync += self.starts.eq(0)
        self.room = Signal(range(self.depth + 1), init=self.depth)
        self.some_room = Signal(init=1)  # room != 0, from a register
        with m.If(self.starts & ~self.taken):
            m.d.sync += [self.room.eq(self.room - 1), self.some_room.eq(self.room != 1)]
        with m.Elif(~self.starts & self.taken):
            m.d.sync += [self.room.eq(self.room + 1), self.some_room.eq(1)]

        with m.FSM(name="state"):
            self._initialise(m)
            self._accept(m)
            with m.State("CHECK"):  # same_row is of this place one cycle later
                m.next = "ROUTE"
            with m.State("ROUTE"):
                with m.If(self.refresh_due):
                    m.next = "CLOSE"
                with m.Elif(~self.busy):
                    m.next = "IDLE"
                with m.Elif(~self.open):
                    m.next = "OPEN"
                with m.Elif(~self.same_row):
                    m.next = "CLOSE"
                with m.Elif(self.write):
                    m.next = "WRITE"
                with m.Else():
                    m.next = "READ"
            self._close_and_open(m)
            self._read(m)
            self._write(m)

    def _initialise(self, m: Module) -> None:
        chip, pins = self.chip, self.pins
        cycles = self._cycles(chip.init_us * 1000)
        timer = Signal(range(cycles + 1), init=cycles)
        left = Signal(range(_INIT_REFRESHES), init=_INIT_REFRESHES - 1)
        with m.State("POWER_UP"):
            m.d.comb += pins.dqm.eq(~Const(0, len(pins.dqm)))
            m.d.sync += timer.eq(timer - 1)
            with m.If(timer == 0):
                self._give(m, Command.PRECHARGE, chip.rp_ns)
                m.d.sync += pins.a.eq(1 << 10)
                m.next = "INIT_REFRESH"
        with m.State("INIT_REFRESH"), m.If(self.may):
            self._give(m, Command.REFRESH, chip.rc_ns)
            m.d.sync += left.eq(left - 1)
            with m.If(left == 0):
                m.next = "MODE"
        with m.State("MODE"), m.If(self.may):
            # burst length 1, sequential, CAS latency, single writes
            self._give(m, Command.LOAD_MODE, 0, chip.mrd_clocks)
            m.d.sync += [pins.a.eq(self.cas << 4), pins.ba.eq(0), self.ready.eq(1)]
            m.d.sync += [
                self.refresh_timer.eq(self.refresh_period - 1),
                self.refresh_due.eq(0),
            ]
            m.next = "IDLE"

    def _accept(self, m: Module) -> None:
        """Take the host's request and the port's in turns: IDLE decides, the next state takes."""
        port, host = self.port.request, self.host.request
        columns = len(self.place)
        with m.State("IDLE"):
            m.d.sync += [self.part.eq(0), self.begins.eq(1)]
            # the host's turn comes after a burst, or when no burst is asked for
            of_host = host.valid & (self.host_next | ~port.valid) & ~self.host.response.valid
            with m.If(self.refresh_due):
                m.next = "ROUTE"
            with m.Elif(of_host):
                m.next = "TAKE_WORD"
            with m.Elif(port.valid):
                m.next = "TAKE_BURST"
        with m.State("TAKE_WORD"):
            m.d.comb += host.ready.eq(1)
            m.d.sync += [
                self.busy.eq(1),
                self.for_host.eq(1),
                self.end.eq(0),  # of two columns
                self.write.eq(host.payload.write),
                self.write_data.eq(host.payload.data),
                self.place.eq(Cat(Const(0, 1), host.payload.address)[:columns]),
                self.words_left.eq(0),
                self.beyond.eq(0),
                self.host_next.eq(0),
            ]
            m.next = "CHECK"
        with m.State("TAKE_BURST"):
            m.d.comb += port.ready.eq(1)
            place = Cat(Const(0, self.per_word.bit_length() - 1), port.payload.address)
            m.d.sync += [
                self.busy.eq(port.payload.length != 0),
                self.for_host.eq(0),
                self.end.eq(self.per_word == 1),
                self.write.eq(0),
                self.place.eq(place[:columns]),
                self.beyond.eq(place[columns:] != 0),
                self.words_left.eq(port.payload.length - 1),
                self.host_next.eq(1),
            ]
            m.next = "CHECK"

    def _close_and_open(self, m: Module) -> None:
        chip, pins = self.chip, self.pins
        with m.State("CLOSE"):
            with m.If(~self.open & self.may):
                m.next = "REFRESH"
            with m.Elif(self.may & self.row_over):
                self._give(m, Command.PRECHARGE, chip.rp_ns)
                m.d.sync += [pins.a.eq(1 << 10), self.open.eq(0)]
                m.next = "CLOSED"
        with m.State("CLOSED"):
            m.next = "OPEN"
            with m.If(self.refresh_due):
                m.next = "REFRESH"
        with m.State("REFRESH"), m.If(self.may & self.cycle_over):
            self._give(m, Command.REFRESH, chip.rc_ns)
            m.d.sync += self.refresh_due.eq(0)
            m.next = "ROUTE"
        with m.State("OPEN"), m.If(self.may & self.cycle_over):
            self._give(m, Command.ACTIVATE, chip.rcd_ns)
            m.d.sync += [
                pins.a.eq(self.row[chip.bank_bits :]),
                self.open.eq(1),
                self.open_row.eq(self.row),
                self.row_wait.eq(self._cycles(chip.ras_ns) - 1),
                self.row_over.eq(self._cycles(chip.ras_ns) == 1),
                self.cycle_wait.eq(self._cycles(chip.rc_ns) - 1),
                self.cycle_over.eq(self._cycles(chip.rc_ns) == 1),
            ]
            m.next = "CHECK"

    def _read(self, m: Module) -> None:
        """READ a column a cycle until the row or the request ends, or a refresh is due."""
        end = self.end
        # `room` does not know of the cycle before: of weight where a word is one column
        single = self.memory_bits == self.chip.data_bits
        room = self.room > self.starts if single else self.some_room
        has_room = ~self.begins | room | self.for_host
        row_ends = self.column.all()
        with m.State("READ"):
            with m.If(self.refresh_due):
                m.next = "CLOSE"
            with m.Elif(self.may & has_room):
                self._give(m, Command.READ)
                m.d.sync += self.place.eq(self.place + 1)
                m.d.sync += self.starts.eq(self.begins & ~self.for_host)
                m.d.sync += [
                    self.tag.valid.eq(1),
                    self.tag.host.eq(self.for_host),
                    self.tag.end.eq(end),
                    self.tag.error.eq(self.beyond),
                    self.tag.last.eq(self.words_left == 0),
                    self.part.eq(Mux(end, 0, self.part + 1)),
                    self.begins.eq(end),
                ]
                before_last = Mux(self.for_host, self.part == 0, self.part + 2 == self.per_word)
                m.d.sync += self.end.eq(Mux(end, self.per_word == 1, before_last))
                with m.If(row_ends):
                    m.next = "CHECK"
                with m.If(end):
                    m.d.sync += self.words_left.eq(self.words_left - 1)
                    with m.If(self.place.all()):  # on from the chip's last word
                        m.d.sync += self.beyond.eq(1)
                    with m.If(self.words_left == 0):
                        m.d.sync += self.busy.eq(0)
                        m.next = "ROUTE"

    def _write(self, m: Module) -> None:
        """Two columns of the host's word, once no data of earlier reads are under way."""
        chip, pins = self.chip, self.pins
        width = chip.data_bits
        recovery = self._cycles(chip.wr_ns, chip.wr_clocks)
        with m.State("WRITE"), m.If(self.may & ~self.in_flight & ~self.tag.valid):
            self._give(m, Command.WRITE)
            m.d.sync += [
                self.place.eq(self.place + 1),
                pins.dq_o.eq(self.write_data[:width]),
                pins.dq_oe.eq(1),
                self.write_data.eq(self.write_data >> width),
                self.part.eq(1),
                self.begins.eq(0),
            ]
            # a write lengthens the time that the row stays open, and never shortens it
            with m.If(self.row_wait < recovery):
                m.d.sync += [self.row_wait.eq(recovery), self.row_over.eq(0)]
            with m.If(self.part == 1):
                m.d.sync += self.busy.eq(0)
                m.next = "ROUTE"
