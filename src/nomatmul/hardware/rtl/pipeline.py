"""Pieces of pipelines that never stop: registers in a row, wide multipliers, and a short queue.

Units whose outputs always find room need no ready inside: what enters leaves a fixed number of
cycles later. Data registers have no reset, only what says whether they hold anything.

Multipliers are made of 18 x 18 signed products, the size of a DSP block, each with a register in
front (the caller's) and behind.
"""

from __future__ import annotations

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

# A limb below the highest one: 17 bits, so that it is a signed number of 18.
_LIMB = 17


def register(m: Module, value: Any, name: str, *, reset: bool = False) -> Signal:
    """`value` one cycle later; starts at 0 and without `reset` stays as it is in a reset."""
    held = Signal(Value.cast(value).shape(), name=name, reset_less=not reset)
    m.d.sync += held.eq(value)
    return held


def delay(m: Module, value: Any, cycles: int, name: str, *, reset: bool = False) -> Any:
    """`value` so many cycles later."""
    for cycle in range(cycles):
        value = register(m, value, f"{name}_{cycle + 1}", reset=reset)
    return value


def copy(m: Module, value: Value, *, reset: bool = False) -> Signal:
    """A register of `value` that synthesis must not share with another of the same value.

    Where many places read one, a copy for each part of them shortens the wires.
    """
    kept = Signal(len(value), attrs={"keep": 1}, reset_less=not reset)
    m.d.sync += kept.eq(value)
    return kept


def _limbs(value: Value) -> list[Value]:
    """Signed numbers of at most 18 bits: value = sum limb[k] << (17 * k)."""
    if len(value) <= _LIMB + 1:
        return [value.as_signed()]
    return [Cat(value[:_LIMB], Const(0, 1)).as_signed(), *_limbs(value[_LIMB:])]


def _added(m: Module, parts: list[Value], name: str) -> Value:
    """sum parts[k] << (17 * k), an addition a cycle: len(parts) - 1 cycles."""
    total = parts[0]
    for k, part in enumerate(parts[1:], 1):
        late = delay(m, part, k - 1, f"{name}_part{k}")
        upper = (total >> (_LIMB * k)) + late
        total = register(m, Cat(total[: _LIMB * k], upper).as_signed(), f"{name}_sum{k}")
    return total


class Multiplier(wiring.Component):
    """product = a * b, signed, `latency` cycles after its operands, which come from registers."""

    def __init__(self, a_bits: int, b_bits: int) -> None:
        limbs = [len(_limbs(Signal(signed(bits)))) for bits in (a_bits, b_bits)]
        self.latency = sum(limbs) - 1
        super().__init__(
            {
                "a": In(signed(a_bits)),
                "b": In(signed(b_bits)),
                "product": Out(signed(a_bits + b_bits)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = []
        for j, b in enumerate(_limbs(self.b)):
            parts = [register(m, a * b, f"limb{i}_{j}") for i, a in enumerate(_limbs(self.a))]
            rows.append(_added(m, parts, f"row{j}"))
        m.d.comb += self.product.eq(_added(m, rows, "product"))
        return m


class Skid(wiring.Component):
    """One item a cycle from `input` to `output`, a cycle later, with registers both ways.

    `input.ready` says that the second of two places is free, so it hangs on no other ready.
    """

    def __init__(self, shape: Any) -> None:
        super().__init__(
            {"input": In(stream.Signature(shape)), "output": Out(stream.Signature(shape))}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        source, sink = self.input, self.output
        spare = Signal.like(source.payload, reset_less=True)
        out = Signal.like(source.payload, reset_less=True)
        waits, move = Signal(), Signal()
        free = Signal(init=1, attrs={"keep": 1})  # ~waits once more, away from its many loads
        m.d.comb += [
            source.ready.eq(free),
            move.eq(~sink.valid | sink.ready),
            sink.payload.eq(out),
        ]
        still = ~move & (waits | source.valid)
        m.d.sync += [waits.eq(still), free.eq(~still)]
        with m.If(~waits):
            m.d.sync += spare.eq(source.payload)
        with m.If(move):
            m.d.sync += [
                sink.valid.eq(waits | source.valid),
                out.eq(Mux(waits, spare, source.payload)),
            ]
        return m


class InOrder(wiring.Component):
    """A queue in distributed memory for what a pipeline needs at its end and had at its start.

    Whoever pops knows that something is there: neither full nor empty is said. `head` is the
    oldest, from the cycle after its push on.
    """

    def __init__(self, shape: Any, depth: int) -> None:
        self._shape = shape
        self._depth = 1 << ceil_log2(depth)
        super().__init__({"push": In(1), "value": In(shape), "pop": In(1), "head": Out(shape)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.store = store = memory.Memory(shape=self._shape, depth=self._depth, init=[])
        write, read = store.write_port(), store.read_port(domain="comb")
        first, last = Signal(range(self._depth)), Signal(range(self._depth))
        m.d.comb += [
            write.addr.eq(last),
            write.data.eq(self.value),
            write.en.eq(self.push),
            read.addr.eq(first),
            self.head.eq(read.data),
        ]
        m.d.sync += [last.eq(last + self.push), first.eq(first + self.pop)]
        return m
