"""Benches and proofs fail where they must: those that see nothing are none."""

from __future__ import annotations

import pytest
from amaranth import Elaboratable, Module, Mux, Signal
from amaranth.hdl import Assert
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from hardware import formal
from hardware.streams import Bench


class Wire(wiring.Component):
    """Input to output, with one fault of choice."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        beat = stream.Signature(8)
        super().__init__({"input": In(beat), "output": Out(beat)})

    def elaborate(self, platform):
        m = Module()
        time = Signal(4)
        m.d.sync += time.eq(time + 1)
        value = self.input.payload
        valid = self.input.valid
        if self.fault == "payload":
            value = value ^ time
        if self.fault == "valid":
            valid = valid & (time != 5)
        m.d.comb += [
            self.output.payload.eq(value),
            self.output.valid.eq(valid),
            self.input.ready.eq(self.output.ready & valid),
        ]
        if self.fault == "doubled":
            m.d.comb += self.input.ready.eq(self.output.ready & valid & (time != 7))
        return m


def pass_bytes(fault: str) -> tuple[list[int], list[int]]:
    dut = Wire(fault)
    bench = Bench(dut, seed=1)
    sent = list(range(50))
    bench.drive(dut.input, sent, stall=0.3)
    got = bench.collect(dut.output, len(sent), stall=0.5)
    bench.run(1000)
    return sent, got


def test_bench_passes_a_right_component() -> None:
    sent, got = pass_bytes("")
    assert got == sent


@pytest.mark.parametrize(
    ("fault", "message"), [("payload", "a payload changed"), ("valid", "valid fell")]
)
def test_bench_sees_a_stream_that_does_not_hold_still(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        pass_bytes(fault)


def test_bench_sees_a_doubled_beat() -> None:
    sent, got = pass_bytes("doubled")
    assert got != sent


def test_bench_ends_where_a_beat_never_comes() -> None:
    dut = Wire()
    bench = Bench(dut)
    bench.drive(dut.input, [1, 2])
    bench.collect(dut.output, 3)
    with pytest.raises(AssertionError, match=r"after 100 cycles there still wait: \['collect"):
        bench.run(100)


class Counter(Elaboratable):
    """Counts the cycles in which a free input is as watched; goes to 0 behind `top`."""

    def __init__(self, step: int, claim: int) -> None:
        self.step, self.claim = step, claim

    def elaborate(self, platform):
        m = Module()
        some, watched = formal.free(m, 4, "some"), formal.watched(m, 4)
        count = Signal(4)
        with m.If(some == watched):
            m.d.sync += count.eq(Mux(count >= 9, 0, count + self.step))
        m.d.comb += Assert(count <= self.claim)
        return m


class Held(Elaboratable):
    """The rule of streams of a wire."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = Wire(self.fault)
        formal.assume_stream(m, dut.input)
        m.d.comb += dut.output.ready.eq(formal.free(m, 1))
        formal.assert_stream(m, dut.output)
        return m


@pytest.mark.parametrize("induction", [False, True])
def test_a_proof_tells_right_from_wrong(induction: bool) -> None:
    formal.prove(Counter(1, 9), depth=8, induction=induction)
    for wrong in (Counter(2, 9), Counter(1, 8)):
        holds, text = formal.answer(wrong, depth=12, induction=induction)
        assert not holds
        assert "FAIL" in text
    # 9 is out of reach of a bounded proof of 5 cycles, and not of an induction
    holds, _ = formal.answer(Counter(1, 8), depth=5, induction=induction)
    assert holds is not induction


def test_the_rule_of_streams_is_proved_and_refuted() -> None:
    formal.prove(Held(""), depth=4)
    for fault in ("payload", "valid"):
        holds, _ = formal.answer(Held(fault), depth=12)
        assert not holds


def test_a_spec_without_claims_is_no_proof() -> None:
    with pytest.raises(RuntimeError, match="yosys failed"):
        formal.answer(Wire(), depth=2)
