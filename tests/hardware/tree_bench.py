"""A bench of the unit of trees: memory, product unit and row unit are played in Python.

`Forest` is a layer of random ternary trees and its records in memory; what the unit must do with it
comes from `nomatmul.reference.trees`, which knows no hardware.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hardware.streams import Bench, plain
from numpy.typing import NDArray

from nomatmul.formats.packing import pack_ternary
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.tree_unit import TreeUnit
from nomatmul.reference.trees import combine, gather_exact, walk

SMALL = Design(
    lanes=32, element_lanes=4, memory_bits=64, trees=True, combine_lanes=8, tree_rows=32,
    vector_words=256, parameter_words=128, activation_beats=8, burst=4, fifo_words=16,
)  # fmt: skip


def words_of(codes: NDArray[np.uint8], memory_bits: int) -> list[int]:
    """Bytes as memory words, zeros behind them."""
    size, raw = memory_bits // 8, codes.tobytes()
    padded = raw + bytes(-len(raw) % size)
    return [int.from_bytes(padded[k : k + size], "little") for k in range(0, len(padded), size)]


def record(t_K: NDArray[np.int8], columns: int, form: str, memory_bits: int) -> list[int]:
    """A row of ternary weights, zeros up to `columns`, in whole words."""
    padded = np.zeros((1, columns), np.int8)
    padded[0, : len(t_K)] = t_K
    per_byte = 4 if form == "2bit" else 5
    packed = pack_ternary(padded, form)[0, : -(-columns // per_byte)]
    return words_of(packed, memory_bits)


@dataclass
class Forest:
    """`trees` trees of `depth` decisions over `size` inputs and outputs. ties: most weights are 0,
    so many sums are."""

    design: Design
    trees: int
    depth: int
    size: int
    seed: int = 0
    ties: bool = False
    w_in_VD: NDArray[np.int8] = field(init=False)
    w_out_VD: NDArray[np.int8] = field(init=False)
    norm_V: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows = self.trees * ((2 << self.depth) - 1)
        shape = rows, self.size
        self.w_in_VD = rng.integers(-1, 2, shape).astype(np.int8)
        if self.ties:
            self.w_in_VD *= rng.random(shape) < 1.5 / self.size
        self.w_out_VD = rng.integers(-1, 2, shape).astype(np.int8)
        self.norm_V = rng.integers(-(1 << 15), 1 << 15, rows)

    @property
    def visits(self) -> int:
        return self.trees * (self.depth + 1)

    @property
    def beats(self) -> int:
        return self.design.beats(self.size)

    def records(self) -> tuple[list[list[int]], list[list[int]]]:
        """The words of each row's two records."""
        bits, lanes = self.design.memory_bits, self.design.lanes
        inside = []
        for t_K, norm in zip(self.w_in_VD, self.norm_V, strict=True):
            beats = np.zeros((self.beats, lanes), np.int8)
            beats.reshape(-1)[: self.size] = t_K
            per_byte = 4 if self.design.packing == "2bit" else 5
            packed = pack_ternary(beats, self.design.packing)[:, : -(-lanes // per_byte)]
            inside.append([*words_of(packed, bits), int(norm) & 0xFFFF | 0xABC0000])
        columns = -(-self.size // self.design.combine_lanes) * self.design.combine_lanes
        return inside, [record(t_K, columns, "2bit", bits) for t_K in self.w_out_VD]

    def expected(
        self, q_D: NDArray[np.int8]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """(sums [A], norm weights [A], rows [A]) of the visits, by the oracle."""

        def sums_of(rows_NT: NDArray[np.int32]) -> NDArray[np.int32]:
            return gather_exact(q_D[None], rows_NT, self.w_in_VD)

        sums_NTL, rows_NTL = walk(sums_of, 1, self.trees, self.depth)
        rows_A = rows_NTL.reshape(-1)
        return sums_NTL.reshape(-1).astype(np.int64), self.norm_V[rows_A], rows_A

    def combined(self, h_A: NDArray[np.int8], rows_A: NDArray[np.int32]) -> NDArray[np.int32]:
        return combine(h_A.astype(np.int32)[None], rows_A[None], self.w_out_VD)[0]


class TreeBench:
    """A TreeUnit with everything around it; every stream stalls with the chance `stall`.

    latency: cycles from a request to its first word. broken: addresses whose words come with an
    error, which are zeros.
    """

    BASE_IN, BASE_OUT = 0x10_0003, 0x20_0001

    def __init__(
        self, forest: Forest, *, stall: float = 0.0, latency: int = 3, seed: int = 0,
        broken: tuple[int, ...] = (), unit: Any = None, extra: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.forest, self.design = forest, forest.design
        self.unit = TreeUnit(self.design) if unit is None else unit
        self.bench = Bench(self.unit, seed=seed)
        self.stall, self.latency, self.rng = stall, latency, random.Random(seed)
        self.broken = broken
        inside, outside = forest.records()
        self.stride_in, self.stride_out = len(inside[0]), len(outside[0])
        self.memory: dict[int, int] = {}
        for base, records in ((self.BASE_IN, inside), (self.BASE_OUT, outside)):
            flat = [word for words in records for word in words]
            self.memory |= dict(enumerate(flat, base))
        self.memory |= extra or {}
        self.fetched: list[int] = []  # addresses in the order asked
        self.products: list[Any] = []
        self.results: list[Any] = []
        self.rows: list[Any] = []
        self.parameters: dict[int, int] = {}
        self.pulses: dict[str, int] = dict.fromkeys(("memory_error", "illegal", "refused"), 0)
        self.q_D = np.zeros(0, np.int8)

    def walk_command(self, **changes: Any) -> dict[str, Any]:
        forest = self.forest
        return {
            "trees": forest.trees, "depth": forest.depth, "base": self.BASE_IN,
            "stride": self.stride_in, "beats": forest.beats, "act": 2, "m": {"m": 1 << 23, "e": -9},
            "fraction": 12, "dst": 20, "wout": 24, **changes,
        }  # fmt: skip

    def combine_command(self, **changes: Any) -> dict[str, Any]:
        forest = self.forest
        return {
            "base": self.BASE_OUT, "stride": self.stride_out, "count": forest.visits,
            "rows": forest.size, "beats": forest.beats, "act": 0, "m": {"m": 1 << 23, "e": -5},
            "fraction": 9, "dst": 40, "aux": 40, **changes,
        }  # fmt: skip

    def run(self, *steps: tuple[str, Any], limit: int = 20_000) -> int:
        """Do ("walk", command), ("activations", int8 values), ("combine", command) one after the
        other, each when the one before is done; return the cycles."""
        unit, bench = self.unit, self.bench
        bench.process(self._memory, background=True)
        bench.process(self._products, background=True)
        bench.process(self._sinks, background=True)

        async def script(ctx: Any) -> None:
            for kind, value in steps:
                if kind == "activations":
                    await self._activate(ctx, value)
                    continue
                stream = getattr(unit, kind)
                ctx.set(stream.payload, value)
                ctx.set(stream.valid, 1)
                taken = False
                while not taken:
                    *_, taken = await ctx.tick().sample(stream.ready)
                ctx.set(stream.valid, 0)
                busy = True
                while busy:
                    *_, busy = await ctx.tick().sample(unit.busy)

        bench.process(script)
        return bench.run(limit)

    async def _activate(self, ctx: Any, values: NDArray[np.int8]) -> None:
        lanes = self.design.element_lanes
        padded = np.zeros(-(-len(values) // lanes) * lanes, np.int64)
        padded[: len(values)] = values
        write = self.unit.activation
        for group, part in enumerate(padded.reshape(-1, lanes)):
            ctx.set(write.valid, 1)
            ctx.set(write.address, group)
            ctx.set(write.data, [int(v) for v in part])
            await ctx.tick()
        # what lies elsewhere is not for this unit
        ctx.set(write.address, self.design.activation_groups - 1)
        ctx.set(write.data, [99] * lanes)
        await ctx.tick()
        ctx.set(write.valid, 0)

    def _goes(self) -> bool:
        return self.rng.random() >= self.stall

    async def _memory(self, ctx: Any) -> None:
        fetch, words = self.unit.fetch, self.unit.words
        waiting: deque[tuple[int, int]] = deque()
        now, current = 0, None
        while True:
            ready = self._goes() and len(waiting) < 40
            ctx.set(fetch.ready, ready)
            if current is None and waiting and waiting[0][0] <= now and self._goes():
                address = waiting.popleft()[1]
                bad = address in self.broken or address not in self.memory
                current = {"data": 0 if bad else self.memory[address], "error": int(bad)}
                ctx.set(words.payload, current)
            ctx.set(words.valid, current is not None)
            *_, asked, request, taken = await ctx.tick().sample(
                fetch.valid, fetch.payload, words.ready
            )
            if asked and ready:
                self.fetched.append(request.address)
                due = now + self.latency
                waiting += [(due, request.address + k) for k in range(request.words)]
            if taken:
                current = None
            now += 1

    async def _products(self, ctx: Any) -> None:
        """Gearbox and product unit: a region a record, its words, then its sum."""
        unit, per_word = self.unit, self.design.memory_bits
        sums: deque[tuple[int, int]] = deque()
        now, region, words, current = 0, 0, [], False
        while True:
            needed = -(-region * self.design.beat_bits // per_word)
            take_command, take_word = self._goes(), region and self._goes()
            take_region = not region and self._goes()
            ctx.set(unit.product.ready, take_command)
            ctx.set(unit.region.ready, take_region)
            ctx.set(unit.product_words.ready, bool(take_word))
            if not current and sums and sums[0][0] <= now and self._goes():
                ctx.set(unit.sums.payload, {"sum": sums.popleft()[1], "row": 0, "last": 0})
                current = True
            ctx.set(unit.sums.valid, current)
            *_, commanded, command, asked, count, came, word, taken = await ctx.tick().sample(
                unit.product.valid, unit.product.payload, unit.region.valid, unit.region.payload,
                unit.product_words.valid, unit.product_words.payload, unit.sums.ready,
            )  # fmt: skip
            if commanded and take_command:
                self.products.append(plain(command))
            if asked and take_region:
                region, words = count, []
            elif came and take_word:
                words.append(word.data)
                if len(words) == needed:
                    sums.append((now + 5, self._dot(words, region)))
                    region = 0
            if taken and current:
                current = False
            now += 1

    def _dot(self, words: list[int], beats: int) -> int:
        design = self.design
        bits = sum(w << (k * design.memory_bits) for k, w in enumerate(words))
        total = 0
        for beat in range(beats):
            value = bits >> (beat * design.beat_bits)
            for lane in range(design.lanes):
                at = beat * design.lanes + lane
                if at >= len(self.q_D):
                    break
                if design.packing == "2bit":
                    code = value >> (2 * lane) & 3
                else:
                    code = digit(value >> (8 * (lane // 5)) & 255, lane % 5)
                total += int(self.q_D[at]) * (code - 1)
        return total

    async def _sinks(self, ctx: Any) -> None:
        unit = self.unit
        while True:
            row, result = self._goes(), self._goes()
            ctx.set(unit.row.ready, row)
            ctx.set(unit.results.ready, result)
            *_, ruled, rule, came, value, wrote, address, mask, data, pulses = (
                await ctx.tick().sample(
                    unit.row.valid, unit.row.payload, unit.results.valid, unit.results.payload,
                    unit.parameter.valid, unit.parameter.address, unit.parameter.mask,
                    unit.parameter.data,
                    unit.memory_error | unit.illegal << 1 | unit.refused << 2,
                )
            )  # fmt: skip
            if ruled and row:
                self.rows.append(plain(rule))
            if came and result:
                self.results.append(plain(value))
            for lane, element in enumerate(plain(data)):
                if wrote and mask >> lane & 1:
                    self.parameters[address * self.design.element_lanes + lane] = element
            for bit, name in enumerate(self.pulses):
                self.pulses[name] += pulses >> bit & 1


def digit(byte: int, place: int) -> int:
    """Digit `place` of a byte of the 1.6-bit form."""
    for _ in range(place):
        byte = byte * 3 & 255
    return byte * 3 >> 8
