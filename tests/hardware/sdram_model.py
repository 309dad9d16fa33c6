"""A behavioural model of a single data rate SDRAM that complains about every broken rule.

`SdramModel.clock` takes what the pins say at one rising edge and returns the data that the chip
drives until the next one (None: high impedance). Broken rules are collected in `faults` as text.
It knows the datasheet's nanoseconds and nothing of the controller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nomatmul.hardware.board.sdram_chip import SdramChip

NEVER = -1e12
COMMANDS = {  # (ras, cas, we), active high
    (0, 0, 0): "nop",
    (1, 0, 0): "activate",
    (0, 1, 0): "read",
    (0, 1, 1): "write",
    (1, 0, 1): "precharge",
    (1, 1, 0): "refresh",
    (1, 1, 1): "mode",
    (0, 0, 1): "stop",
}


@dataclass
class Bank:
    row: int | None = None
    opened: float = NEVER
    closed: float = NEVER
    written: float = NEVER  # time of the last written data


@dataclass
class SdramModel:
    chip: SdramChip
    clock_hz: float
    # rows are refreshed in turn; what lies in the chip, by (bank, row, column)
    cells: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.period = 1e9 / self.clock_hz
        self.now = 0.0
        self.faults: list[str] = []
        self.banks = [Bank() for _ in range(1 << self.chip.bank_bits)]
        self.cas: int | None = None  # unknown until the mode is loaded
        self.mode_at = self.refreshed = NEVER
        self.refreshes = 0  # before the mode is loaded
        self.precharged = False
        self.activated = NEVER  # in any bank
        self.pending: dict[int, int] = {}  # cycle -> data that the chip drives at its edge
        self.cycle = 0
        self.counts: dict[str, int] = dict.fromkeys(COMMANDS.values(), 0)

    # -- helpers ----------------------------------------------------------------------------------

    def _fault(self, text: str) -> None:
        self.faults.append(f"{self.now:.1f} ns: {text}")

    def _after(self, name: str, since: float, least_ns: float) -> None:
        if self.now - since < least_ns - 1e-3:
            self._fault(f"{name}: {self.now - since:.1f} ns instead of {least_ns:g}")

    def load(self, data: bytes) -> None:
        """Fill the chip from address 0 on, low byte of a column first."""
        for k in range(0, len(data), 2):
            column = k // 2
            self.cells[self._place(column)] = int.from_bytes(data[k : k + 2], "little")

    def _place(self, column: int) -> tuple[int, int, int]:
        chip = self.chip
        return (
            column >> chip.column_bits & ((1 << chip.bank_bits) - 1),
            column >> (chip.column_bits + chip.bank_bits),
            column & ((1 << chip.column_bits) - 1),
        )

    # -- one edge ---------------------------------------------------------------------------------

    def clock(
        self, *, cke: int, cs: int, command: int, a: int, ba: int, dqm: int, dq: int | None
    ) -> int | None:
        """One rising edge. command: bits ras, cas, we from bit 0; dq: what the controller drives.

        Returns what the chip drives up to the next edge.
        """
        driven = self.pending.pop(self.cycle, None)
        if driven is not None and dq is not None:
            self._fault("both sides drive the data")
        if not cke:
            self._fault("clock enable is low")
        word = COMMANDS[command & 1, command >> 1 & 1, command >> 2 & 1] if cs else "nop"
        self.counts[word] += 1
        if word != "nop":
            self._any(word)
            getattr(self, f"_{word}")(a, ba, dqm, dq)
        elif dq is not None:
            self._fault("data driven without a write")
        if self.cas is not None:
            self._check_refresh()
        self.cycle += 1
        self.now += self.period
        return self.pending.get(self.cycle)

    def _any(self, word: str) -> None:
        if self.now < self.chip.init_us * 1000 - 1e-3:
            self._fault(f"{word} {self.now:.0f} ns after power up, before {self.chip.init_us} us")
        self._after(f"tMRD before {word}", self.mode_at, self.chip.mrd_clocks * self.period)
        self._after(f"tRC (refresh) before {word}", self.refreshed, self.chip.rc_ns)

    def _check_refresh(self) -> None:
        late = self.now - self.refreshed
        if late > self.chip.refresh_interval_ns and late - self.period <= (
            self.chip.refresh_interval_ns
        ):
            self._fault(f"no refresh for {late:.0f} ns")
        for number, bank in enumerate(self.banks):
            if bank.row is not None and self.now - bank.opened > self.chip.ras_max_ns:
                self._fault(f"bank {number} is open for longer than tRAS max")

    def _stop(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        self._fault("burst stop, which nobody needs")

    def _precharge(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        self.precharged = True
        for number, bank in enumerate(self.banks):
            if (number == ba or a >> 10 & 1) and bank.row is not None:
                self._after("tRAS", bank.opened, self.chip.ras_ns)
                recovery = max(self.chip.wr_ns, self.chip.wr_clocks * self.period)
                self._after("tWR", bank.written, recovery)
                bank.row, bank.closed = None, self.now

    def _refresh(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        if not self.precharged:
            self._fault("refresh before all banks were precharged")
        for number, bank in enumerate(self.banks):
            if bank.row is not None:
                self._fault(f"refresh while bank {number} is open")
            self._after("tRP before refresh", bank.closed, self.chip.rp_ns)
            self._after("tRC before refresh", bank.opened, self.chip.rc_ns)
        self.refreshed = self.now
        self.refreshes += 1

    def _mode(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        if self.refreshes < 8:
            self._fault(f"mode loaded after {self.refreshes} refreshes instead of 8")
        if any(bank.row is not None for bank in self.banks):
            self._fault("mode loaded while a bank is open")
        if a & 0b111 or ba or a >> 3 & 1:
            self._fault(f"mode {a:#x} is not single sequential columns")
        self.cas = a >> 4 & 0b111
        limit = {2: self.chip.cas2_max_mhz, 3: self.chip.cas3_max_mhz}.get(self.cas, 0)
        if self.clock_hz > limit * 1e6:
            self._fault(f"CAS latency {self.cas} at {self.clock_hz / 1e6:g} MHz")
        self.mode_at = self.now

    def _activate(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        bank = self.banks[ba]
        if self.cas is None:
            self._fault("activate before the mode is loaded")
        if bank.row is not None:
            self._fault(f"activate while bank {ba} is open")
        self._after("tRP", bank.closed, self.chip.rp_ns)
        self._after("tRC", bank.opened, self.chip.rc_ns)
        self._after("tRRD", self.activated, max(self.chip.rrd_ns, 2 * self.period))
        bank.row, bank.opened = a, self.now
        self.activated = self.now

    def _column(self, word: str, a: int, ba: int) -> tuple[int, int, int] | None:
        bank = self.banks[ba]
        if bank.row is None:
            self._fault(f"{word} in bank {ba}, which is closed")
            return None
        self._after("tRCD", bank.opened, self.chip.rcd_ns)
        if a >> 10 & 1:
            self._fault("automatic precharge, which the controller does not know")
        return ba, bank.row, a & ((1 << self.chip.column_bits) - 1)

    def _read(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        place = self._column("read", a, ba)
        if place is not None and self.cas is not None:
            self.pending[self.cycle + self.cas] = self.cells.get(place, 0xDEAD)

    def _write(self, a: int, ba: int, dqm: int, dq: int | None) -> None:
        place = self._column("write", a, ba)
        # the chip's drivers need the rest of a cycle to let go
        if any(cycle >= self.cycle for cycle in self.pending):
            self._fault("write while read data are under way")
        if dq is None:
            self._fault("write without data")
        elif dqm:
            self._fault("write is masked")
        elif place is not None:
            self.cells[place] = dq
            self.banks[ba].written = self.now
