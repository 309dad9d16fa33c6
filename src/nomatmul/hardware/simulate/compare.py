"""What the simulated design wrote against the integer oracle, instruction by instruction.

Everything that an instruction writes into a memory, a register or to the host is compared, and
nothing else may be written; and the instructions are those of the program's path, in order. The
first difference is told with its token, instruction, value and element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.hardware import isa
from nomatmul.hardware.compile import Compiled
from nomatmul.hardware.disassemble import disassemble
from nomatmul.hardware.isa import Epilogue, Instruction
from nomatmul.hardware.simulate.events import Events, Kind, segments
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.trace import Trace

Int = NDArray[np.int64]

# Of a trace: what no memory keeps, and what the host alone reads.
_UNSEEN = (".sums", ".rows", "argmax")


@dataclass(frozen=True)
class Difference:
    """Where the design and the oracle part. element: -1 where it is no matter of one."""

    token: int
    instruction: int
    text: str
    name: str
    element: int
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"token {self.token}, instruction {self.instruction} ({self.text})"
        element = "" if self.element < 0 else f"[{self.element}]"
        return f"{where}: {self.name}{element} is {self.found}, the oracle has {self.expected}"


@dataclass(frozen=True)
class _Write:
    """Values that one instruction must leave: `count` of a memory from `address` on."""

    name: str
    kind: Kind
    address: int
    values: Int


class Comparison:
    """Runs the oracle beside the design. instructions, values: how many were found equal."""

    def __init__(self, compiled: Compiled, model: IntegerModel) -> None:
        self._compiled, self._model = compiled, model
        self._design = compiled.design
        self._state = model.new_state()
        self._parameters = _loaded(compiled)
        self.tokens = self.instructions = self.values = 0

    def token(self, events: Events, token: int, *, wanted: bool, fresh: bool) -> Difference | None:
        """Compare what one token left; the first difference, or None."""
        if fresh:
            self._state = self._model.new_state()
        trace = Trace()
        self._model.step(token, self._state, trace)
        values = dict(trace)
        assert len(values) == len(trace.entries), "names of a trace are unique"
        self._check_covered(values)
        found = segments(events)
        # constants are loaded once, in front of the first token
        first = 0 if found and found[0][0] == 0 else None
        path = list(self._path(first, wanted))
        for at, (index, written) in enumerate(found):
            if at >= len(path) or path[at] != index:
                expected = f"instruction {path[at]}" if at < len(path) else "the end of the token"
                return self._difference(index, "the path", expected, f"instruction {index}")
            difference = self._instruction(index, written, values)
            if difference is not None:
                return difference
            self.instructions += 1
        if len(found) < len(path):
            missing = path[len(found)]
            return self._difference(missing, "the path", f"instruction {missing}", "nothing")
        self.tokens += 1
        return None

    def _path(self, start: int | None, wanted: bool) -> Iterator[int]:
        """The instructions of a token: from TOKEN (or `start`) up to the next one's."""
        program, seen = self._compiled.program, False
        at = start
        if at is None:
            at = next(n for n, i in enumerate(program) if isinstance(i, isa.Token))
        while True:
            instruction = program[at]
            if isinstance(instruction, isa.Token):
                if seen:
                    return
                seen = True
            yield at
            if isinstance(instruction, isa.Jump) or (
                isinstance(instruction, isa.Skip) and not wanted
            ):
                at = instruction.target
            else:
                at += 1

    def _check_covered(self, values: dict[str, Int]) -> None:
        """Every value that a memory keeps is one that some instruction is compared by."""
        if self.tokens == 0:
            named = {name for names in self._compiled.values for name in names}
            rest = {name for name in set(values) - named if not name.endswith(_UNSEEN)}
            assert not rest, f"no instruction leaves {min(rest)}"
            assert named <= set(values), f"the oracle has no {min(named - set(values))}"

    def _instruction(
        self, index: int, written: Events, values: dict[str, Int]
    ) -> Difference | None:
        expected = self._expected(index, values)
        for kind in Kind:
            events = written[written["kind"] == kind]
            wanted = [write for write in expected if write.kind == kind]
            addresses, found = self._cells(kind, events)
            for write in wanted:
                inside = (addresses >= write.address) & (
                    addresses < write.address + len(write.values)
                )
                difference = self._write(index, write, addresses[inside], found[inside])
                if difference is not None:
                    return difference
                addresses, found = addresses[~inside], found[~inside]
            if len(addresses) and not self._padding(kind, wanted, addresses):
                name = f"{kind.name.lower()} {addresses[0]}"
                return self._difference(index, name, "no write there", str(found[0]))
        return None

    def _padding(self, kind: Kind, wanted: list[_Write], addresses: Int) -> bool:
        """Whether these are the rest of a last group, which is written whole."""
        if kind not in (Kind.ACTIVATION, Kind.PARAMETER) or not wanted:
            return False
        end = wanted[-1].address + len(wanted[-1].values)
        whole = -(-end // self._design.element_lanes) * self._design.element_lanes
        return bool((addresses >= end).all() and (addresses < whole).all())

    def _write(self, index: int, write: _Write, addresses: Int, found: Int) -> Difference | None:
        count = len(write.values)
        times = np.bincount(addresses - write.address, minlength=count)
        if (times != 1).any():
            element = int(np.argmax(times != 1))
            how = "nothing" if times[element] == 0 else f"written {times[element]} times"
            value = str(write.values[element])
            return self._difference(index, write.name, value, how, element)
        held = np.empty(count, np.int64)
        held[addresses - write.address] = found
        if (held != write.values).any():
            element = int(np.argmax(held != write.values))
            value = str(write.values[element])
            return self._difference(index, write.name, value, str(held[element]), element)
        self.values += count
        return None

    def _cells(self, kind: Kind, events: Events) -> tuple[Int, Int]:
        """(address, value) of every element that events of one kind wrote."""
        lanes, addresses = self._design.element_lanes, events["address"].astype(np.int64)
        if kind == Kind.SCALAR:
            both = np.stack([events["value"], events["more"]], axis=1).astype(np.int64)
            at = 2 * addresses[:, None] + np.arange(2)
            return at.reshape(-1), both.reshape(-1)
        if kind == Kind.LOGIT:
            return np.arange(len(events)), events["value"].astype(np.int64)
        if kind not in (Kind.ACTIVATION, Kind.PARAMETER):
            return addresses, events["value"].astype(np.int64)
        at = (addresses[:, None] * lanes + np.arange(lanes)).reshape(-1)
        data = np.ascontiguousarray(events["data"])
        if kind == Kind.ACTIVATION:
            return at, data[:, :lanes].astype(np.int64).reshape(-1)
        mask = (events["value"].astype(np.int64)[:, None] >> np.arange(lanes) & 1).astype(bool)
        return at[mask.reshape(-1)], data.view("<i2").astype(np.int64)[mask]

    def _expected(self, index: int, values: dict[str, Int]) -> list[_Write]:
        instruction, names = self._compiled.program[index], self._compiled.values[index]
        found = [(name, values[name]) for name in names]
        if isinstance(instruction, isa.Sconst):
            found = [("constant", np.array([instruction.m, instruction.e]))]
        elif isinstance(instruction, isa.Loadp):
            found = [("parameters", self._parameters[index])]
        places = self._places(instruction)
        assert len(places) == len(found), disassemble(instruction)
        return [
            _Write(name, kind, address, array)
            for (name, array), (kind, address) in zip(found, places, strict=True)
        ]

    def _places(self, i: Instruction) -> list[tuple[Kind, int]]:
        """Memory and address of each value that an instruction leaves, in order of its names."""
        if isinstance(i, isa.Embed | isa.Combine):
            return [(Kind.VECTOR, i.dst)]
        if isinstance(i, isa.Loadp):
            return [(Kind.PARAMETER, i.dst)]
        if isinstance(i, isa.Quant):
            return [(Kind.ACTIVATION, i.dst * self._design.lanes)]
        if isinstance(i, isa.Walk):
            return [(Kind.VECTOR, i.dst), (Kind.PARAMETER, i.wout)]
        if isinstance(i, isa.Product):
            if i.epilogue == Epilogue.LOGITS:
                return [(Kind.LOGIT, 0)]
            if i.epilogue == Epilogue.MLGRU:
                return [(Kind.STATE, i.aux), (Kind.VECTOR, i.dst2), (Kind.VECTOR, i.dst)]
            return [(Kind.VECTOR, i.dst)]
        register = getattr(i, "sd", None)
        return [] if register is None else [(Kind.SCALAR, 2 * register)]

    def _difference(
        self, index: int, name: str, expected: str, found: str, element: int = -1
    ) -> Difference:
        text = (
            disassemble(self._compiled.program[index])
            if index < len(self._compiled.program)
            else "none"
        )
        return Difference(self.tokens, index, text, name, element, expected, found)


def _loaded(compiled: Compiled) -> dict[int, Int]:
    """{index of a LOADP: the int16 that it loads}, which come in the order of their regions."""
    regions = iter(region for region in compiled.regions if region.kind == "parameters")
    width, found = compiled.design.memory_bytes, {}
    with open(compiled.image_path, "rb") as file:
        for index, instruction in enumerate(compiled.program):
            if isinstance(instruction, isa.Loadp):
                file.seek(next(regions).address * width)
                data = file.read(2 * instruction.count)
                found[index] = np.frombuffer(data, "<i2").astype(np.int64)
    return found
