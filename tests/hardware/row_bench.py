"""A row unit between memories of Python, and what its commands should leave, by the reference.

Everything that is written is checked twice: memory when `busy` falls, and the number of writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.ports import Epilogue
from nomatmul.hardware.rtl.row_unit import CAUSES, RowUnit
from nomatmul.reference.integer import Formats, gates, table
from nomatmul.reference.integer.numerics import shift_rounded
from nomatmul.reference.integer.scalar import Scalar
from nomatmul.reference.integer.vector import rescale
from tests.hardware.streams import Bench, Process

SLOTS = {Epilogue.MLGRU: 3, Epilogue.GLU: 2}


def formats_of(design: Design) -> Formats:
    return Formats(**{name: getattr(design, name) for name in Formats.__dataclass_fields__})


@dataclass
class Job:
    """A command with its sums: sums int [elements, slots]."""

    epilogue: Epilogue
    sums: list[list[int]]
    scalars: list[tuple[int, int]]
    fraction: int = 12
    u_shift: int = 12
    dst: int = 0
    dst2: int = 0
    aux: int = 0
    lb: int = 0
    bounded: int = 0
    fresh: int = 0

    @property
    def slots(self) -> int:
        return SLOTS.get(self.epilogue, 1)

    def command(self) -> dict[str, Any]:
        fields = ("fraction", "u_shift", "dst", "dst2", "aux", "lb", "bounded", "fresh")
        scalars = [{"m": m, "e": e} for m, e in self.scalars]
        scalars += [{"m": 0, "e": 0}] * (3 - len(scalars))
        return {
            "epilogue": self.epilogue,
            "rows": len(self.sums) * self.slots,
            "slots": self.slots,
            "scalars": scalars,
            **{name: getattr(self, name) for name in fields},
        }

    def beats(self) -> list[dict[str, int]]:
        rows = [(acc, slot) for element in self.sums for slot, acc in enumerate(element)]
        return [
            {"sum": acc, "slot": slot, "row": row, "last": row == len(rows) - 1}
            for row, (acc, slot) in enumerate(rows)
        ]


@dataclass
class Machine:
    """The memories as the reference leaves them, job after job."""

    design: Design
    vectors: list[int]
    parameters: list[int]
    state: list[int]
    logits: list[dict[str, int]] = field(default_factory=list)
    argmax: tuple[int, int] = (0, 0)
    writes: int = 0
    saturations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))

    def run(self, job: Job) -> None:
        if not job.sums:
            return
        formats = formats_of(self.design)
        bits = self.design.vector_bits
        y = []
        for slot in range(job.slots):
            m, e = job.scalars[slot]
            acc = np.array([element[slot] for element in job.sums])
            scalar = Scalar(np.array(m), np.array(e))
            y.append(rescale(acc, scalar, job.fraction, bits))
            wide = rescale(acc, scalar, job.fraction, 60)
            self.saturations["rescale"] += int((wide != y[-1]).sum())
        count = len(job.sums)
        if job.epilogue == Epilogue.STORE:
            self._store(job.dst, y[0])
        elif job.epilogue == Epilogue.ADD:
            x = np.array(self.vectors[job.aux : job.aux + count])
            total = gates.residual(x, y[0], formats)
            self.saturations["residual"] += int((total != x + y[0]).sum())
            self._store(job.dst, total)
        elif job.epilogue == Epilogue.SILU:
            self._store(job.dst, table.silu(y[0], formats))
        elif job.epilogue == Epilogue.GLU:
            u = gates.glu(y[0], y[1], job.u_shift, formats)
            exact = shift_rounded(table.silu(y[0], formats) * y[1], job.u_shift)
            self.saturations["product"] += int((u != exact).sum())
            self._store(job.dst, u)
        elif job.epilogue == Epilogue.MLGRU:
            self._mlgru(job, *y, formats)
        else:
            self.logits += [{"value": v, "last": k == count - 1} for k, v in enumerate(y[0])]
            best = int(np.argmax(y[0]))
            self.argmax = (best, int(y[0][best]))

    def _mlgru(self, job: Job, zf: Any, zi: Any, zg: Any, formats: Formats) -> None:
        count = len(zf)
        h = np.zeros(count, np.int64)
        if not job.fresh:
            h = np.array(self.state[job.aux : job.aux + count])
        bound = None
        if job.bounded:
            bound = np.array(self.parameters[job.lb : job.lb + count]) & 0xFFFF
        step = gates.mlgru(zf, zi, zg, h, bound, job.u_shift, formats)
        wide = gates.next_state(
            gates.forget_gate(zf, bound, formats), zi, h, formats.replace(state_bits=32)
        )
        self.saturations["state"] += int((wide != step.state).sum())
        silu = table.silu(
            shift_rounded(step.state, formats.state_fraction - formats.vector_fraction), formats
        )
        self.saturations["product"] += int((shift_rounded(zg * silu, job.u_shift) != step.u).sum())
        self.state[job.aux : job.aux + count] = step.state.tolist()
        self._store(job.dst, step.u)
        self._store(job.dst2, zg)

    def _store(self, at: int, values: Any) -> None:
        self.vectors[at : at + len(values)] = [int(value) for value in values]
        self.writes += len(values)


@dataclass(frozen=True)
class Ran:
    cycles: int
    saturations: dict[str, int]


def check(design: Design, jobs: list[Job], *, seed: int = 0, stalls: bool = True) -> Ran:
    """Run the jobs on a row unit and compare after each."""
    rng = random.Random(seed)
    bits = design.vector_bits
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    vectors = [
        rng.choice([least, most, rng.randint(least, most) // 2]) for _ in range(design.vector_words)
    ]
    parameters = [
        rng.choice([0, -1, rng.randint(-32768, 32767)]) for _ in range(design.parameter_words)
    ]
    machine = Machine(design, list(vectors), list(parameters), [0] * design.state_words)
    unit = RowUnit(design)
    bench = Bench(unit, seed=seed)
    state = [0] * design.state_words
    writes = [0]

    def read_memory(port: Any, content: list[int]) -> Process:
        lanes = design.element_lanes

        async def process(ctx: Any) -> None:
            inside = [0] * lanes  # the memory's answer, a register before it is seen
            while True:
                *_, enable, group = await ctx.tick().sample(port.enable, port.address)
                ctx.set(port.data, inside)
                if enable:
                    inside = content[group * lanes : (group + 1) * lanes]

        return process

    def write_memory(port: Any, content: list[int], count: bool) -> Process:
        async def process(ctx: Any) -> None:
            while True:
                *_, valid, address, value = await ctx.tick().sample(
                    port.valid, port.address, port.data
                )
                if valid:
                    content[address] = value
                    writes[0] += count

        return process

    async def commands(ctx: Any) -> None:
        for job in jobs:
            while not ctx.get(unit.command.ready):
                await ctx.tick()
            ctx.set(unit.command.payload, job.command())
            ctx.set(unit.command.valid, 1)
            await ctx.tick()
            ctx.set(unit.command.valid, 0)
            while ctx.get(unit.busy):
                await ctx.tick()
            machine.run(job)
            assert state == machine.state, job
            differ = [k for k in range(len(vectors)) if vectors[k] != machine.vectors[k]]
            assert not differ, (job, [(k, vectors[k], machine.vectors[k]) for k in differ])
            assert writes[0] == machine.writes, job
            if job.epilogue == Epilogue.LOGITS and job.sums:
                found = (ctx.get(unit.argmax.index), ctx.get(unit.argmax.value))
                assert found == machine.argmax, job
            while stalls and rng.random() < 0.5:
                await ctx.tick()
        counts = [ctx.get(count) for count in unit.saturations]
        assert dict(zip(CAUSES, counts, strict=True)) == machine.saturations

    for process in (
        read_memory(unit.vector_read, vectors),
        read_memory(unit.parameter_read, parameters),
        write_memory(unit.vector_write, vectors, True),
        write_memory(unit.state_write, state, False),
    ):
        bench.process(process, background=True)
    bench.process(commands)
    beats = [beat for job in jobs for beat in job.beats()]
    bench.drive(unit.sums, beats, stall=rng.choice([0, 0.3, 0.7]) if stalls else 0)
    logits = sum(len(job.sums) for job in jobs if job.epilogue == Epilogue.LOGITS)
    got = bench.collect(unit.logits, logits, stall=rng.choice([0, 0.5, 0.9]) if stalls else 0)
    cycles = bench.run()
    assert got == machine.logits
    return Ran(cycles, machine.saturations)
