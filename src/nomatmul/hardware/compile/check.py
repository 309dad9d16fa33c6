"""A static check of a program: every operand in range, every value written before it is read, and
every word of the stream taken exactly once, in order.

It follows the program through two tokens, one without and one with logits, and keeps which
addresses hold a value, never the value itself: what instructions compute is the integer oracle's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.hardware import isa
from nomatmul.hardware.compile.image import Region
from nomatmul.hardware.compile.trees import out_words
from nomatmul.hardware.design import Design
from nomatmul.hardware.disassemble import disassemble
from nomatmul.hardware.isa import Epilogue, Instruction

PARAMETER_BYTES = 2


@dataclass(frozen=True)
class Memory:
    """What a program reads: the regions of the image, its words, the rows of the embedding."""

    regions: Sequence[Region]
    words: int
    vocabulary: int


def check_program(program: Sequence[Instruction], design: Design, memory: Memory) -> None:
    """Raises ValueError naming the first instruction that is wrong, and why."""
    if len(program) > design.program_words:
        raise ValueError(
            f"the program needs {len(program)} instructions, and the design's program_words is"
            f" {design.program_words}"
        )
    walk = _Walk(program, design, memory)
    for wanted in (False, True):
        walk.token(wanted)
    walk.back_at_token()


class _Walk:
    """The state of a design in which values are only known to be there or not."""

    def __init__(self, program: Sequence[Instruction], design: Design, memory: Memory) -> None:
        self._program, self._design, self._memory = program, design, memory
        self._regions = {
            r.address: r for r in memory.regions if r.kind in ("parameters", "rows") and r.words
        }
        self._scalars = np.zeros(isa.SCALARS, bool)
        self._vector = np.zeros(design.vector_words, bool)
        self._parameters = np.zeros(design.parameter_words, bool)
        self._beats = np.zeros(design.activation_beats, bool)
        self._streams: list[tuple[int, int]] = []  # (address, words) that are yet to come
        self._at = 0
        self._steps: dict[type[Instruction], Callable[..., None]] = {
            isa.Stream: self._stream,
            isa.Embed: self._embed,
            isa.Loadp: self._loadp,
            isa.Sconst: lambda i: self._writes_scalar(i.sd),
            isa.Smul: self._two,
            isa.Sadd: self._two,
            isa.Sdiv: self._two,
            isa.Ssqrt: self._root,
            isa.Scan: self._scan,
            isa.Sumsq: self._sumsq,
            isa.Quant: self._quant,
            isa.Product: self._product,
            isa.Walk: self._walk,
            isa.Combine: self._combine,
        }

    def token(self, wanted: bool) -> None:
        """From where the program is to behind its next TOKEN, and on until just before another."""
        self.back_at_token()
        self._at += 1
        self._run(wanted)

    def back_at_token(self) -> None:
        """Up to the next TOKEN, which must not wait for words that nothing took."""
        self._run(wanted=True)

    def _run(self, wanted: bool) -> None:
        for _ in range(2 * len(self._program) + 2):
            if not 0 <= self._at < len(self._program):
                raise ValueError(f"the program goes on at {self._at}, behind its end")
            instruction = self._program[self._at]
            if isinstance(instruction, isa.Token):
                self._check_streams()
                return
            if isinstance(instruction, isa.Jump):
                self._at = instruction.target
            elif isinstance(instruction, isa.Skip):
                self._at = self._at + 1 if wanted else instruction.target
            elif type(instruction) not in self._steps:
                self._fail("the program ends here, and tokens are still to come")
            else:
                self._steps[type(instruction)](instruction)
                self._at += 1
        raise ValueError("the program goes round without a TOKEN")

    def _fail(self, why: str) -> None:
        raise ValueError(f"instruction {self._at} ({disassemble(self._program[self._at])}): {why}")

    # -- operands ---------------------------------------------------------------------------------

    def _span(self, name: str, at: int, count: int, size: int, unit: int) -> slice:
        if at + count > size:
            self._fail(f"{name} {at}..{at + count - 1} reaches behind the design's {size}")
        if at % unit:
            self._fail(f"{name} {at} is not a multiple of {unit}")
        return slice(at, at + count)

    def _reads(self, name: str, held: NDArray[np.bool_], at: int, count: int, unit: int) -> None:
        part = self._span(name, at, count, len(held), unit)
        if not held[part].all():
            self._fail(f"{name} {at + int(np.argmin(held[part]))} is read, and nothing wrote it")

    def _writes(self, name: str, held: NDArray[np.bool_], at: int, count: int, unit: int) -> None:
        held[self._span(name, at, count, len(held), unit)] = True

    def _reads_vector(self, at: int, count: int) -> None:
        self._reads("vector element", self._vector, at, count, self._design.element_lanes)

    def _writes_vector(self, at: int, count: int) -> None:
        self._writes("vector element", self._vector, at, count, self._design.element_lanes)

    def _reads_parameters(self, at: int, count: int) -> None:
        self._reads("parameter", self._parameters, at, count, self._design.element_lanes)

    def _reads_beats(self, at: int, count: int) -> None:
        self._reads("activation beat", self._beats, at, count, 1)

    def _reads_scalars(self, *registers: int) -> None:
        for register in registers:
            if not self._scalars[register]:
                self._fail(f"scalar {register} is read, and nothing wrote it")

    def _writes_scalar(self, register: int) -> None:
        self._scalars[register] = True

    def _fetches(self, base: int, stride: int, records: int, words: int) -> None:
        if words > stride:
            self._fail(f"a record has {words} words, and the next one begins {stride} behind it")
        end = base + (records - 1) * stride + words
        if end > self._memory.words:
            self._fail(f"records reach to word {end}, and the image has {self._memory.words}")

    # -- the stream -------------------------------------------------------------------------------

    def _stream(self, i: isa.Stream) -> None:
        if i.address + i.words > self._memory.words:
            self._fail(
                f"it streams up to word {i.address + i.words}, the image has {self._memory.words}"
            )
        self._check_streams()
        self._streams.append((i.address, i.words))

    def _takes(self, kind: str, bits: int) -> None:
        """The instruction takes a region of so many bits off the front of the stream."""
        words = self._design.words(bits)
        if not self._streams:
            self._fail(f"it takes {words} words, and nothing streams")
        address, left = self._streams[0]
        region = self._regions.get(address)
        if region is None or region.kind != kind or region.words != words:
            self._fail(f"it takes {words} words of {kind}, and the stream brings {region}")
        if words > left:
            self._fail(f"it takes {words} words, and {left} are left in the stream")
        self._streams[0] = (address + words, left - words)
        if left == words:
            self._streams.pop(0)

    def _check_streams(self) -> None:
        for address, words in self._streams:
            self._fail(f"{words} words from {address} on are in the stream, and nothing took them")

    # -- instructions -----------------------------------------------------------------------------

    def _embed(self, i: isa.Embed) -> None:
        need = self._design.piece_words(8 * (8 + i.rows))
        if i.words < need:  # the loader would wait for the rest of its last piece
            self._fail(f"{i.words} words do not hold a scale and {i.rows} bytes: {need} do")
        self._fetches(i.base, i.stride, self._memory.vocabulary, i.words)
        self._writes_vector(i.dst, i.rows)

    def _loadp(self, i: isa.Loadp) -> None:
        self._takes("parameters", i.count * 8 * PARAMETER_BYTES)
        self._writes("parameter", self._parameters, i.dst, i.count, self._design.element_lanes)

    def _two(self, i: isa.Smul | isa.Sadd | isa.Sdiv) -> None:
        self._reads_scalars(i.sa, i.sb)
        self._writes_scalar(i.sd)

    def _root(self, i: isa.Ssqrt) -> None:
        self._reads_scalars(i.sa)
        self._writes_scalar(i.sd)

    def _weighted(self, i: isa.Scan | isa.Sumsq | isa.Quant) -> None:
        self._reads_vector(i.src, i.count)
        if not i.ones:
            self._reads_parameters(i.w, i.count)

    def _scan(self, i: isa.Scan) -> None:
        self._weighted(i)
        self._writes_scalar(i.sd)

    def _sumsq(self, i: isa.Sumsq) -> None:
        self._weighted(i)
        self._reads_scalars(i.sa)
        self._writes_scalar(i.sd)

    def _quant(self, i: isa.Quant) -> None:
        self._weighted(i)
        self._reads_scalars(i.sa, i.sr)
        self._writes("activation beat", self._beats, i.dst, self._design.beats(i.count), 1)

    def _product(self, i: isa.Product) -> None:
        self._takes("rows", i.rows * i.beats * self._design.beat_bits)
        self._reads_beats(i.act, i.slots * i.beats)
        self._reads_scalars(*range(i.m, i.m + i.slots))
        count = i.rows // i.slots
        if i.epilogue == Epilogue.LOGITS:
            return
        if i.epilogue == Epilogue.ADD:
            self._reads_vector(i.aux, count)
        if i.epilogue == Epilogue.MLGRU:
            self._span("state", i.aux, count, self._design.state_words, self._design.element_lanes)
            if i.bounded:
                self._reads_parameters(i.lb, count)
            self._writes_vector(i.dst2, count)
        self._writes_vector(i.dst, count)

    def _walk(self, i: isa.Walk) -> None:
        visits = i.trees * (i.depth + 1)
        self._check_visits(visits)
        words = self._design.words(i.beats * self._design.beat_bits) + 1
        if words != i.stride:
            self._fail(f"a node has {words} words, and its stride is {i.stride}")
        self._fetches(i.base, i.stride, i.trees * ((2 << i.depth) - 1), words)
        self._reads_beats(i.act, i.beats)
        self._reads_scalars(i.m)
        self._writes_vector(i.dst, visits)
        unit = self._design.element_lanes
        self._writes("parameter", self._parameters, i.wout, visits, unit)

    def _combine(self, i: isa.Combine) -> None:
        self._check_visits(i.count)
        words = out_words(i.rows, self._design)
        if words != i.stride:
            self._fail(f"a record has {words} words, and its stride is {i.stride}")
        self._fetches(i.base, i.stride, 1, words)
        self._reads_beats(i.act, self._design.beats(i.count))
        self._reads_scalars(i.m)
        self._reads_vector(i.aux, i.rows)
        self._writes_vector(i.dst, i.rows)

    def _check_visits(self, visits: int) -> None:
        if not self._design.trees:
            self._fail("the design has no unit of trees")
        if visits > self._design.tree_rows:
            self._fail(f"{visits} nodes are visited, tree_rows is {self._design.tree_rows}")
