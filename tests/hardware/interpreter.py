"""The instruction set in numpy, by the integer reference's functions: what a program writes.

Each instruction gives {(memory, address): value} of all that it writes, in the names and units of
the probe; trees apart, which have tests of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.reference.integer import gates, scalar, table, vector
from nomatmul.reference.integer.numerics import Formats, Int
from nomatmul.reference.integer.scalar import Scalar

Writes = dict[tuple[str, int], Any]


def formats_of(design: Design) -> Formats:
    """The reference's widths of a design."""
    return Formats(
        vector_bits=design.vector_bits,
        vector_fraction=design.vector_fraction,
        state_bits=design.state_bits,
        state_fraction=design.state_fraction,
        table_bits=design.table_bits,
    )


def pack_rows(design: Design, rows: Int) -> bytes:
    """A region of the stream: rows of -1, 0, 1, each padded to whole beats; 2-bit codes."""
    assert design.packing == "2bit"
    beats = design.beats(rows.shape[1])
    codes = np.ones((rows.shape[0], beats * design.lanes), np.uint8)
    codes[:, : rows.shape[1]] = rows + 1
    bits = codes.reshape(-1, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    return pad(design, bits.sum(axis=1).astype(np.uint8).tobytes())


def pad(design: Design, data: bytes) -> bytes:
    """Up to whole memory words."""
    return data + bytes(-len(data) % design.memory_bytes)


class Interpreter:
    """Runs a program; `image` is the memory, `tokens` are (id, want_logits, fresh) in order."""

    def __init__(self, design: Design, image: bytes, tokens: list[tuple[int, int, int]]) -> None:
        self.design, self.image, self.tokens = design, image, list(tokens)
        self.formats = formats_of(design)
        self.x = np.zeros(design.vector_words, np.int64)
        self.parameters = np.zeros(design.parameter_words, np.int64)
        self.state = np.zeros(design.state_words, np.int64)
        self.q = np.zeros(design.activation_beats * design.lanes, np.int64)
        self.scalars: list[tuple[int, int]] = [(0, 0)] * isa.SCALARS
        self.token = (0, 0, 0)
        self.stream: list[bytes] = []
        self.pc = 0

    def run(self, program: list[isa.Instruction]) -> list[tuple[int, Writes]]:
        """(index, writes) of every instruction that retires, until HALT or no token."""
        done = []
        while not isinstance(program[self.pc], isa.Halt):
            instruction, at = program[self.pc], self.pc
            if isinstance(instruction, isa.Token) and not self.tokens:
                break
            self.pc += 1
            writes: Writes = {}
            getattr(self, f"_{instruction.name.lower()}")(instruction, writes)
            done.append((at, writes))
        return done

    # -- control and memory ----------------------------------------------------------------------

    def _token(self, i: isa.Token, writes: Writes) -> None:
        self.token = self.tokens.pop(0)

    def _jump(self, i: isa.Jump, writes: Writes) -> None:
        self.pc = i.target

    def _skip(self, i: isa.Skip, writes: Writes) -> None:
        if not self.token[1]:
            self.pc = i.target

    def _words(self, address: int, words: int) -> list[bytes]:
        size = self.design.memory_bytes
        return [self.image[k * size : (k + 1) * size] for k in range(address, address + words)]

    def _stream(self, i: isa.Stream, writes: Writes) -> None:
        self.stream += self._words(i.address, i.words)

    def _take(self, size: int) -> bytes:
        words = -(-size // self.design.memory_bytes)
        taken, self.stream = self.stream[:words], self.stream[words:]
        return b"".join(taken)[:size]

    def _loadp(self, i: isa.Loadp, writes: Writes) -> None:
        for k, value in enumerate(np.frombuffer(self._take(2 * i.count), "<i2")):
            self._set(writes, "parameter", self.parameters, i.dst + k, value)

    def _embed(self, i: isa.Embed, writes: Writes) -> None:
        assert not self.stream
        self.stream = self._words(i.base + self.token[0] * i.stride, i.words)
        record = self._take(8 + i.rows)
        m, e = np.frombuffer(record[:8], "<i4")
        values = np.frombuffer(record[8:], np.int8).astype(np.int64)
        y = self._rescale(values, Scalar(np.int64(m), np.int64(e)), i.fraction)
        self._set_all(writes, "vector", self.x, i.dst, y)

    # -- scalars and vectors ---------------------------------------------------------------------

    def _set(self, writes: Writes, name: str, memory: Int, at: int, value: Any) -> None:
        memory[at] = value
        writes[name, at] = int(value)

    def _set_all(self, writes: Writes, name: str, memory: Int, at: int, values: Int) -> None:
        for k, value in enumerate(values):
            self._set(writes, name, memory, at + k, value)

    def _put(self, writes: Writes, sd: int, value: Scalar) -> None:
        self.scalars[sd] = writes["scalar", sd] = int(value.m), int(value.e)

    def _get(self, register: int) -> Scalar:
        m, e = self.scalars[register]
        return Scalar(np.int64(m), np.int64(e))

    def _sconst(self, i: isa.Sconst, writes: Writes) -> None:
        self._put(writes, i.sd, Scalar(np.int64(i.m), np.int64(i.e)))

    def _smul(self, i: isa.Smul, writes: Writes) -> None:
        self._put(writes, i.sd, scalar.mul(self._get(i.sa), self._get(i.sb)))

    def _sadd(self, i: isa.Sadd, writes: Writes) -> None:
        self._put(writes, i.sd, scalar.add(self._get(i.sa), self._get(i.sb)))

    def _sdiv(self, i: isa.Sdiv, writes: Writes) -> None:
        self._put(writes, i.sd, scalar.div(self._get(i.sa), self._get(i.sb)))

    def _ssqrt(self, i: isa.Ssqrt, writes: Writes) -> None:
        self._put(writes, i.sd, scalar.sqrt(self._get(i.sa)))

    def _operands(self, i: isa.Scan | isa.Sumsq | isa.Quant) -> tuple[Int, Int]:
        w = np.full(i.count, vector.ONES) if i.ones else self.parameters[i.w : i.w + i.count]
        return self.x[i.src : i.src + i.count], w

    def _scan(self, i: isa.Scan, writes: Writes) -> None:
        self._put(writes, i.sd, vector.scan(*self._operands(i)))

    def _sumsq(self, i: isa.Sumsq, writes: Writes) -> None:
        self._put(writes, i.sd, vector.sumsq(*self._operands(i), self._get(i.sa)))

    def _quant(self, i: isa.Quant, writes: Writes) -> None:
        q = vector.quantise(*self._operands(i), self._get(i.sa), self._get(i.sr))
        padded = np.zeros(-(-i.count // self.design.element_lanes) * self.design.element_lanes)
        padded[: i.count] = q
        self._set_all(writes, "activation", self.q, i.dst * self.design.lanes, padded.astype(int))

    # -- products --------------------------------------------------------------------------------

    def _rescale(self, acc: Int, factor: Scalar, fraction: int) -> Int:
        return vector.rescale(acc, factor, fraction, self.formats.vector_bits)

    def _sums(self, i: isa.Product) -> Int:
        """[rows / slots, slots]."""
        width = i.beats * self.design.lanes
        data = np.frombuffer(self._take(i.rows * width // 4), np.uint8)
        codes = (data[:, None] >> np.arange(0, 8, 2)) & 3
        rows = codes.reshape(-1, i.slots, width).astype(np.int64) - 1
        start = i.act * self.design.lanes
        q = self.q[start : start + i.slots * width].reshape(i.slots, width)
        return (rows * q).sum(axis=2)

    def _product(self, i: isa.Product, writes: Writes) -> None:
        sums = self._sums(i)
        y = [self._rescale(sums[:, s], self._get(i.m + s), i.fraction) for s in range(i.slots)]
        size = len(sums)
        if i.epilogue == isa.Epilogue.LOGITS:
            for k, value in enumerate(y[0]):
                writes["logit", k] = int(value)
            return
        if i.epilogue == isa.Epilogue.STORE:
            out = y[0]
        elif i.epilogue == isa.Epilogue.ADD:
            out = gates.residual(self.x[i.aux : i.aux + size], y[0], self.formats)
        elif i.epilogue == isa.Epilogue.SILU:
            out = table.silu(y[0], self.formats)
        elif i.epilogue == isa.Epilogue.GLU:
            out = gates.glu(y[0], y[1], i.u_shift, self.formats)
        else:
            fresh = self.token[2]
            h = np.zeros(size, np.int64) if fresh else self.state[i.aux : i.aux + size]
            bound = self.parameters[i.lb : i.lb + size] & 0xFFFF if i.bounded else None
            step = gates.mlgru(y[0], y[1], y[2], h, bound, i.u_shift, self.formats)
            out = step.u
            self._set_all(writes, "state", self.state, i.aux, step.state)
            self._set_all(writes, "vector", self.x, i.dst2, y[2])
        self._set_all(writes, "vector", self.x, i.dst, out)
