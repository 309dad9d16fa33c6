"""The SDRAM controller against the model of a chip that flags every broken rule."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hardware.sdram_model import SdramModel
from hardware.streams import Bench

from nomatmul.hardware.board.sdram import Sdram
from nomatmul.hardware.board.sdram_chip import CHIPS, SdramChip

ULX3S = CHIPS["ulx3s-32mb"]
# the model of the power-up time is the chip's; most tests do not wait for it
QUICK = dataclasses.replace(ULX3S, init_us=2.0)


class Board:
    """A controller, a chip and a bench; `io` registers of the pins lie between them."""

    def __init__(
        self,
        memory_bits: int = 64,
        chip: SdramChip = QUICK,
        clock_hz: float = 100e6,
        *,
        io: int = 0,
        seed: int = 0,
        controller_chip: SdramChip | None = None,
    ) -> None:
        self.memory_bits = memory_bits
        self.controller = Sdram(memory_bits, controller_chip or chip, clock_hz, io_stages=io)
        self.chip = SdramModel(chip, clock_hz)
        self.bench = Bench(self.controller, seed=seed)
        self.bench.simulator.add_process(self._wires(io))

    def _wires(self, io: int) -> Any:
        pins = self.controller.pins

        async def process(ctx: Any) -> None:
            out, back = io // 2, io - io // 2
            late: list[Any] = [None] * out
            data: list[int] = [0xBAD] * back
            names = ("cke", "cs", "command", "a", "ba", "dqm", "dq_o", "dq_oe")
            async for _, _, *values in ctx.tick().sample(*(getattr(pins, n) for n in names)):
                late.append(dict(zip(names, values, strict=True)))
                now = late.pop(0)
                if now is None:
                    now = dict.fromkeys(names, 0) | {"cke": 1}
                oe, dq = now.pop("dq_oe"), now.pop("dq_o")
                now["command"] = int(getattr(now["command"], "value", now["command"]))
                driven = self.chip.clock(**now, dq=dq if oe else None)
                data.append(0xBAD if driven is None else driven)
                ctx.set(pins.dq_i, data.pop(0))

        return process

    def words(self, data: bytes) -> list[int]:
        size = self.memory_bits // 8
        return [int.from_bytes(data[k : k + size], "little") for k in range(0, len(data), size)]

    def read(self, requests: list[tuple[int, int]], *, stall: float = 0.0) -> list[Any]:
        """Ask for bursts (address, length) and collect their words."""
        port = self.controller.port
        self.bench.drive(port.request, [{"address": a, "length": n} for a, n in requests])
        return self.bench.collect(port.response, sum(n for _, n in requests), stall=stall)

    def run(self) -> None:
        self.bench.run()
        assert self.chip.faults == []


def noise(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.mark.parametrize("io", [0, 2])
@pytest.mark.parametrize("memory_bits", [16, 64, 512])
def test_bursts_come_back_in_order_and_no_rule_is_broken(memory_bits: int, io: int) -> None:
    board = Board(memory_bits, io=io, seed=memory_bits)
    data = noise(1 << 14)
    board.chip.load(data)
    words = board.words(data)
    rng = random.Random(5)
    requests = []
    for _ in range(12):
        length = rng.randint(1, 16)
        requests.append((rng.randrange(len(words) - length), length))
    got = board.read(requests, stall=0.2)
    board.run()
    expected = [
        {"data": words[a + k], "error": 0, "last": int(k == n - 1)}
        for a, n in requests
        for k in range(n)
    ]
    assert got == expected


def test_sequential_reads_use_nine_tenths_of_the_cycles() -> None:
    board = Board(512)
    count, burst = 320, 16
    board.chip.load(noise(count * 64))
    board.read([(a, burst) for a in range(0, count, burst)])
    reads: list[int] = []
    before = board.chip.clock

    def clock(**pins: Any) -> int | None:
        if pins["command"] == 0b010:
            reads.append(board.chip.cycle)
        return before(**pins)

    board.chip.clock = clock  # type: ignore[method-assign]
    board.run()
    columns = count * 512 // 16
    assert len(reads) == columns
    assert columns / (reads[-1] - reads[0] + 1) >= 0.9
    assert board.chip.counts["refresh"] > 8 + 10  # refreshes are counted in


@pytest.mark.parametrize("clock_hz", [25e6, 100e6, 133e6])
def test_an_idle_chip_is_initialised_and_refreshed_in_time(clock_hz: float) -> None:
    chip = dataclasses.replace(ULX3S, init_us=20.0)
    board = Board(64, chip, clock_hz)
    controller = board.controller
    spans = round(100e-6 * clock_hz)

    async def idle(ctx: Any) -> None:
        await ctx.tick().repeat(spans)
        assert ctx.get(controller.ready)

    board.bench.simulator.add_testbench(idle)
    board.bench.simulator.run()
    assert board.chip.faults == []
    assert board.chip.cas == (2 if clock_hz <= 100e6 else 3)
    assert board.chip.counts["refresh"] >= 8 + 10


def test_the_host_writes_and_reads_between_bursts() -> None:
    board = Board(64, seed=9)
    host = board.controller.host
    rng = random.Random(2)
    values = {rng.randrange(0, 1 << 23): rng.getrandbits(32) for _ in range(20)}
    values[0], values[(1 << 23) - 1] = 0x01234567, 0x89ABCDEF
    requests = [{"address": a, "write": 1, "data": v} for a, v in values.items()]
    requests += [{"address": a, "write": 0, "data": 0} for a in values]
    board.bench.drive(host.request, requests)
    answers = board.bench.collect(host.response, len(values), stall=0.3)
    board.read([(0, 3), (1 << 21, 4)] * 5, stall=0.1)
    board.run()
    assert answers == list(values.values())
    assert board.chip.counts["write"] == 2 * len(values)


def test_words_behind_the_chip_are_zeros_with_an_error() -> None:
    board = Board(512)
    last = ULX3S.bytes // 64 - 1
    board.chip.load(b"\xff" * 64)
    got = board.read([(last, 2), (last + 1, 1), (1 << 31, 1), (0, 1)])
    board.run()
    assert [word["error"] for word in got] == [0, 1, 1, 1, 0]
    assert [word["data"] for word in got[1:4]] == [0, 0, 0]
    assert got[4]["data"] == (1 << 512) - 1


# every rule that the controller must keep, broken by a controller that believes in a faster chip
WRONG = {
    "tRCD": {"rcd_ns": 1},
    "tRP": {"rp_ns": 1},
    "tRAS": {"ras_ns": 1},
    "tWR": {"wr_ns": 0, "wr_clocks": 1},
    "tRC (refresh)": {"rc_ns": 10},
    "no refresh for": {"refresh_ms": 128},
    "after power up": {"init_us": 1},
    "CAS latency": {"cas2_max_mhz": 143},
}


@pytest.mark.parametrize("rule", WRONG)
def test_the_model_flags_a_controller_of_a_faster_chip(rule: str) -> None:
    clock = 133e6 if rule == "CAS latency" else 100e6
    slow = dataclasses.replace(QUICK, rcd_ns=80, rp_ns=80, ras_ns=200, rc_ns=300, wr_ns=250)
    wrong: dict[str, Any] = dict(WRONG[rule])
    board = Board(64, slow, clock, controller_chip=dataclasses.replace(slow, **wrong))
    writes = [{"address": 1 << (9 + k), "write": 1, "data": k} for k in range(4)]
    board.bench.drive(board.controller.host.request, writes)
    board.read([(k * 7919 % 4096, 16) for k in range(30)])
    board.bench.run()
    assert any(rule in fault for fault in board.chip.faults), board.chip.faults[:3]


def _edge(command: int, **pins: Any) -> dict[str, Any]:
    return {"cke": 1, "cs": 1, "command": command, "a": 0, "ba": 0, "dqm": 0, "dq": None, **pins}


def test_the_model_flags_what_no_controller_of_ours_does() -> None:
    model = SdramModel(dataclasses.replace(ULX3S, init_us=0.0), 100e6)
    nop, activate, read, write, precharge, refresh, mode = 0, 1, 2, 6, 5, 3, 7

    def says(text: str, *edges: dict[str, Any]) -> None:
        model.faults.clear()
        for edge in edges:
            model.clock(**edge)
        assert any(text in fault for fault in model.faults), (text, model.faults)

    says("before all banks", _edge(refresh))
    says("instead of 8", _edge(precharge, a=1 << 10), *[_edge(nop)] * 9, _edge(mode, a=0x20))
    says("tMRD", _edge(activate, ba=1))
    says("which is closed", *[_edge(nop)] * 8, _edge(read, ba=3))
    says("is open", *[_edge(nop)] * 8, _edge(activate, ba=1))
    says("tRRD", *[_edge(nop)] * 8, _edge(activate, ba=2), _edge(activate, ba=0))
    says("under way", *[_edge(nop)] * 8, _edge(read, ba=1), _edge(write, ba=1, dq=5))
    says("both sides", *[_edge(nop)] * 8, _edge(read, ba=1), _edge(nop), _edge(nop, dq=5))
    says("masked", *[_edge(nop)] * 8, _edge(write, ba=1, dq=5, dqm=1))
    says("without a write", _edge(nop, dq=5))
    says("refresh while", *[_edge(nop)] * 8, _edge(refresh))
    says("tRAS max", *[_edge(nop)] * 10_001)
    says("clock enable", _edge(nop, cke=0))


@pytest.mark.parametrize(
    ("bits", "clock_hz", "words"),
    [(24, 100e6, "memory_bits"), (64, 200e6, "143 MHz"), (64, 10e6, "too slow")],
)
def test_impossible_controllers_are_refused(bits: int, clock_hz: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sdram(bits, ULX3S, clock_hz)
