"""Cycles of a token, computed from a program: what each instruction takes, and what memory allows.

Instructions run one behind the other while the streamer fills its FIFO, so a token takes as long
as its instructions, and longer where the FIFO runs empty. The figures of the units are those of
their own tests; a simulation says how far the whole is from the truth (the report names which of
the two it was given).

Legend: E elements a group, M bits of a memory word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design

DISPATCH = 6  # fetch, decode, hand over, retire
PRODUCT_FILL = 40  # first beat to first sum through array and row unit
_SCALAR = {isa.Smul: 8, isa.Sadd: 14, isa.Sdiv: 28, isa.Ssqrt: 28, isa.Sconst: 1}
_VECTOR = {isa.Scan: 13, isa.Sumsq: 17, isa.Quant: 12}
LATENCY = 40  # cycles from asking a memory to its first word


@dataclass(frozen=True)
class Cycles:
    """Of one token. `beats`: the array takes weights; `waiting`: for memory; `words`: read."""

    cycles: float
    beats: float
    waiting: float
    words: float

    @property
    def busy(self) -> float:
        """The share of all cycles in which the array takes a beat."""
        return self.beats / self.cycles


class _Stream:
    """The words that a FIFO holds while time passes; they come `rate` a cycle."""

    def __init__(self, rate: float, depth: int) -> None:
        self.rate, self.depth = rate, depth
        self.held = self.left = 0.0
        self.words = 0.0

    def start(self, words: float) -> None:
        self.left += words
        self.words += words

    def let_pass(self, cycles: float) -> None:
        come = min(self.left, self.depth - self.held, self.rate * cycles)
        self.held += come
        self.left -= come

    def take(self, words: float, cycles: float) -> float:
        """Take `words` within `cycles` if they come; returns the cycles that it took."""
        if self.held + min(self.left, self.rate * cycles) < words:
            cycles = max(cycles, (words - self.held) / self.rate)
        come = min(self.left, self.rate * cycles, self.depth - self.held + words)
        self.held = max(0.0, self.held + come - words)
        self.left -= come
        return cycles


def token_cycles(
    program: Iterable[isa.Instruction], design: Design, words_per_cycle: float
) -> Cycles:
    """Cycles of the instructions of one token, jumps not followed.

    words_per_cycle: what the memory delivers, in words of `design.memory_bits`.
    """
    stream = _Stream(min(1.0, words_per_cycle), design.fifo_words)
    total = beats = waiting = 0.0
    for instruction in program:
        total += DISPATCH
        stream.let_pass(DISPATCH)
        if isinstance(instruction, isa.Stream):
            stream.start(instruction.words)
            continue
        least, words = cost(instruction, design)
        took = stream.take(words, least) if words else least
        if not words:
            stream.let_pass(least)
        if isinstance(instruction, isa.Embed | isa.Walk | isa.Combine):
            stream.words += _fetched(instruction, design)
            took += LATENCY + _fetched(instruction, design) / stream.rate
        total += took
        if isinstance(instruction, isa.Product):
            beats += instruction.rows * instruction.beats
            waiting += took - least
    return Cycles(total, beats, waiting, stream.words)


def cost(instruction: isa.Instruction, design: Design) -> tuple[float, float]:
    """(cycles where memory is no limit, words taken off the stream)."""
    if isinstance(instruction, isa.Product):
        beats = instruction.rows * instruction.beats
        return beats + PRODUCT_FILL, design.words(beats * design.beat_bits)
    if isinstance(instruction, isa.Loadp):
        groups = -(-instruction.count // design.element_lanes)
        return float(groups), design.words(16 * instruction.count)
    if isinstance(instruction, isa.Scan | isa.Sumsq | isa.Quant):
        groups = -(-instruction.count // design.element_lanes)
        depth = int(math.log2(design.element_lanes))
        if isinstance(instruction, isa.Scan):
            depth *= 2
        return groups + depth + _VECTOR[type(instruction)], 0
    if isinstance(instruction, isa.Embed | isa.Combine):
        return instruction.rows + PRODUCT_FILL, 0
    if isinstance(instruction, isa.Walk):
        visits = instruction.trees * (instruction.depth + 1)
        return visits * (instruction.beats + PRODUCT_FILL), 0
    return float(_SCALAR.get(type(instruction), 1)), 0


def _fetched(instruction: isa.Embed | isa.Walk | isa.Combine, design: Design) -> int:
    """Words that are fetched record by record."""
    if isinstance(instruction, isa.Embed):
        return instruction.words
    if isinstance(instruction, isa.Walk):
        return instruction.trees * (instruction.depth + 1) * instruction.stride
    return instruction.count * instruction.stride
