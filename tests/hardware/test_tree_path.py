"""WALK and COMBINE through the real fetcher, gearbox, product unit, row unit and memories.

h and the residual are those of the integer oracle, and only visited records are read.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
from amaranth import Module, Mux
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from hardware.streams import Bench
from hardware.tree_bench import SMALL, Forest, TreeBench

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.fetcher import RowFetcher
from nomatmul.hardware.rtl.gearbox import Gearbox
from nomatmul.hardware.rtl.products import ProductUnit
from nomatmul.hardware.rtl.row_unit import RowUnit
from nomatmul.hardware.rtl.tree_unit import TreeUnit
from nomatmul.hardware.rtl.vector_memory import ParameterMemory, VectorMemory
from nomatmul.reference.integer.numerics import Formats, saturate
from nomatmul.reference.integer.scalar import Scalar
from nomatmul.reference.integer.table import silu
from nomatmul.reference.integer.vector import rescale

DESIGN = SMALL
FORMATS = Formats()
X, H, WOUT = 0, 96, 24  # addresses of the residual, of h and of gathered weights


class Path(wiring.Component):
    """The unit of trees between its neighbours, as in the whole accelerator."""

    def __init__(self) -> None:
        super().__init__(
            {
                "walk": In(stream.Signature(ports.WalkCommand)),
                "combine": In(stream.Signature(ports.CombineCommand)),
                "memory": Out(ports.MemoryPort(DESIGN.memory_bits)),
                "activation": In(ports.ActivationWrite(DESIGN)),
                "vector_init": In(ports.vector_write(DESIGN)),
                "vector_write": Out(ports.vector_write(DESIGN)),
                "parameter": Out(ports.parameter_write(DESIGN)),
                "busy": Out(1),
                "flags": Out(8),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.tree = tree = TreeUnit(DESIGN)
        m.submodules.fetcher = fetcher = RowFetcher(DESIGN)
        m.submodules.gearbox = gearbox = Gearbox(DESIGN.memory_bits, DESIGN.beat_bits)
        m.submodules.product = product = ProductUnit(DESIGN)
        m.submodules.row = row = RowUnit(DESIGN)
        m.submodules.vector = vector = VectorMemory(DESIGN)
        m.submodules.parameters = parameters = ParameterMemory(DESIGN)
        connect(m, flipped(self.walk), tree.walk)
        connect(m, flipped(self.combine), tree.combine)
        connect(m, fetcher.memory, flipped(self.memory))
        connect(m, tree.fetch, fetcher.command)
        connect(m, fetcher.words, tree.words)
        connect(m, tree.region, gearbox.command)
        connect(m, tree.product_words, gearbox.words)
        connect(m, gearbox.output, product.beats)
        connect(m, tree.product, product.command)
        connect(m, product.sums, tree.sums)
        connect(m, tree.row, row.command)
        connect(m, tree.results, row.sums)
        connect(m, row.vector_read, vector.read)
        connect(m, row.parameter_read, parameters.read)
        connect(m, tree.parameter, parameters.write)
        init, write = self.vector_init, row.vector_write
        m.d.comb += [
            vector.write.valid.eq(init.valid | write.valid),
            vector.write.address.eq(Mux(init.valid, init.address, write.address)),
            vector.write.data.eq(Mux(init.valid, init.data, write.data)),
            row.logits.ready.eq(1),
            self.busy.eq(tree.busy | row.busy | product.busy),
            self.flags[0].eq(tree.memory_error | tree.illegal | tree.refused),
            self.flags[1:].eq(row.saturated.any()),
        ]
        for unit in (tree, product):
            for name in ("valid", "address", "data"):
                port = getattr(unit.activation, name)
                m.d.comb += port.eq(getattr(self.activation, name))
        for mine, theirs in ((self.vector_write, write), (self.parameter, tree.parameter)):
            for name in mine.signature.members:
                m.d.comb += getattr(mine, name).eq(getattr(theirs, name))
        return m


class PathBench:
    """Memory with a latency and stalls around a Path, and what it writes."""

    def __init__(self, memory: dict[int, int], *, stall: float, latency: int, seed: int) -> None:
        self.path = Path()
        self.bench = Bench(self.path, seed=seed)
        self.memory, self.stall, self.latency = memory, stall, latency
        self.rng = random.Random(seed)
        self.vector: dict[int, int] = {}
        self.parameters: dict[int, int] = {}
        self.read: list[int] = []
        self.flags = 0
        self.bench.process(self._serve, background=True)
        self.bench.process(self._watch, background=True)

    async def _serve(self, ctx: Any) -> None:
        port = self.path.memory
        waiting: deque[tuple[int, int, int]] = deque()
        now, current = 0, None
        while True:
            ready = self.rng.random() >= self.stall
            ctx.set(port.request.ready, ready)
            free = current is None and waiting and waiting[0][0] <= now
            if free and self.rng.random() >= self.stall:
                _, address, last = waiting.popleft()
                self.read.append(address)
                current = {"data": self.memory[address], "error": 0, "last": last}
                ctx.set(port.response.payload, current)
            ctx.set(port.response.valid, current is not None)
            *_, asked, request, taken = await ctx.tick().sample(
                port.request.valid, port.request.payload, port.response.ready
            )
            if asked and ready:
                words = range(request.address, request.address + request.length)
                waiting += [(now + self.latency, at, int(at == words[-1])) for at in words]
            if taken:
                current = None
            now += 1

    async def _watch(self, ctx: Any) -> None:
        path, lanes = self.path, DESIGN.element_lanes
        write, parameter = path.vector_write, path.parameter
        while True:
            *_, v, at, value, p, group, mask, data, flags = await ctx.tick().sample(
                write.valid, write.address, write.data,
                parameter.valid, parameter.address, parameter.mask, parameter.data, path.flags,
            )  # fmt: skip
            self.flags |= flags
            if v:
                self.vector[at] = value
            for lane in range(lanes):
                if p and mask >> lane & 1:
                    self.parameters[group * lanes + lane] = data[lane]


async def activate(ctx: Any, port: Any, values: np.ndarray, beat: int) -> None:
    lanes = DESIGN.element_lanes
    beats = DESIGN.beats(len(values))
    padded = np.zeros(beats * DESIGN.lanes, np.int64)
    padded[: len(values)] = values
    for group, part in enumerate(padded.reshape(-1, lanes), beat * DESIGN.lanes // lanes):
        ctx.set(port.valid, 1)
        ctx.set(port.address, group)
        ctx.set(port.data, [int(v) for v in part])
        await ctx.tick()
    ctx.set(port.valid, 0)


async def order(ctx: Any, port: Any, busy: Any, command: dict[str, Any]) -> None:
    ctx.set(port.payload, command)
    ctx.set(port.valid, 1)
    taken = False
    while not taken:
        *_, taken = await ctx.tick().sample(port.ready)
    ctx.set(port.valid, 0)
    waits = True
    while waits:
        *_, waits = await ctx.tick().sample(busy)


@pytest.mark.parametrize(
    ("trees", "depth", "size", "latency", "stall"),
    [
        (4, 3, 45, 9, 0.35),
        (4, 3, 45, 2, 0),
        (1, 4, 33, 30, 0.35),
        (6, 0, 64, 3, 0),
        (7, 2, 90, 1, 0.35),
    ],
)
def test_the_whole_path_is_the_oracles(trees, depth, size, latency, stall):
    rng = np.random.default_rng(trees)
    forest = Forest(DESIGN, trees, depth, size, seed=size)
    plan = TreeBench(forest)  # its records and commands
    bench = PathBench(plan.memory, stall=stall, latency=latency, seed=size)
    path = bench.path
    q_D, h_A = (rng.integers(-127, 128, n).astype(np.int8) for n in (size, forest.visits))
    x_D = rng.integers(-(1 << 20), 1 << 20, size)
    factors = (
        Scalar(np.int64(11_000_003), np.int64(-30)),
        Scalar(np.int64(9_000_001), np.int64(-28)),
    )
    m_in, m_out = ({"m": int(f.m), "e": int(f.e)} for f in factors)

    async def script(ctx: Any) -> None:
        for at, value in enumerate(x_D):
            ctx.set(path.vector_init.valid, 1)
            ctx.set(path.vector_init.address, X + at)
            ctx.set(path.vector_init.data, int(value))
            await ctx.tick()
        ctx.set(path.vector_init.valid, 0)
        await activate(ctx, path.activation, q_D, 2)
        walk = plan.walk_command(m=m_in, dst=H, wout=WOUT)
        await order(ctx, path.walk, path.busy, walk)
        await activate(ctx, path.activation, h_A, 0)
        combine = plan.combine_command(m=m_out, dst=X, aux=X, fraction=12)
        await order(ctx, path.combine, path.busy, combine)

    bench.bench.process(script)
    bench.bench.run(30_000)
    sums_A, norm_A, rows_A = forest.expected(q_D)
    h = silu(rescale(sums_A, factors[0], 12, FORMATS.vector_bits), FORMATS)
    y_D = rescale(
        forest.combined(h_A, rows_A).astype(np.int64), factors[1], 12, FORMATS.vector_bits
    )
    x_new = saturate(x_D + y_D, FORMATS.vector_bits)
    assert len(np.unique(h)) > 2
    expected = dict(enumerate(h.tolist(), H)) | dict(enumerate(x_new.tolist(), X))
    assert bench.vector == expected
    assert bench.parameters == dict(enumerate(norm_A.tolist(), WOUT))
    visited = [
        base + int(row) * stride + word
        for base, stride in ((plan.BASE_IN, plan.stride_in), (plan.BASE_OUT, plan.stride_out))
        for row in rows_A
        for word in range(stride)
    ]
    assert sorted(bench.read) == sorted(visited)
    assert bench.flags == 0
