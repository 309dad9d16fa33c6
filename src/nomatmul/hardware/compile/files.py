"""The files of a compiled model: program.bin, image.bin and map.json.

map.json says what lies where and where it came from: the design, checksums of model and design, the
fractions of the fixed-point numbers, the regions of the image, and the names of the values that
each instruction leaves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.compile.folds import Step
from nomatmul.hardware.compile.image import Image, Region
from nomatmul.hardware.design import Design
from nomatmul.hardware.disassemble import disassemble
from nomatmul.hardware.isa import INSTRUCTION_BITS, Instruction, Stream, decode, encode
from nomatmul.reference.integer.model import IntegerModel

PROGRAM_FILE, IMAGE_FILE, MAP_FILE = "program.bin", "image.bin", "map.json"
FORMAT, FORMAT_VERSION = "nomatmul-hardware", 1
_BYTES = INSTRUCTION_BITS // 8


@dataclass(frozen=True)
class Compiled:
    """A compiled directory. values: for each instruction the names of what it leaves."""

    directory: Path
    design: Design
    program: tuple[Instruction, ...]
    values: tuple[tuple[str, ...], ...]
    regions: tuple[Region, ...]
    vocabulary: int
    summary: dict[str, Any]

    @property
    def image_path(self) -> Path:
        return self.directory / IMAGE_FILE

    @property
    def image_bytes(self) -> int:
        """Of all regions."""
        words = max((region.address + region.words for region in self.regions), default=0)
        return words * self.design.memory_bytes

    @property
    def program_path(self) -> Path:
        return self.directory / PROGRAM_FILE


def design_hash(design: Design) -> str:
    """Names a design: the sha256 (hex) of its parameters. `probe` adds outputs and changes none."""
    values = {**dataclasses.asdict(design), "probe": False}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_program(directory: Path, program: Sequence[Instruction]) -> None:
    """16 bytes an instruction, the low ones first."""
    data = b"".join(encode(instruction).to_bytes(_BYTES, "little") for instruction in program)
    (directory / PROGRAM_FILE).write_bytes(data)


def describe(
    directory: Path,
    reader: PackedReader,
    model: IntegerModel,
    design: Design,
    image: Image,
    steps: Sequence[Step],
) -> dict[str, Any]:
    """Write map.json, and return its summary."""
    streams = [step.instruction for step in steps if isinstance(step.instruction, Stream)]
    sizes = [stream.words * design.memory_bytes for stream in streams]
    embedded = next(region for region in image.regions if region.kind == "embedding")
    record = embedded.words // len(model.network.embedding) * design.memory_bytes
    fractions = model.fractions
    summary = {
        "instructions": len(steps),
        "image_bytes": image.words * design.memory_bytes,
        # what trees fetch comes on top, node by node
        "bytes_a_token": sum(sizes) + record,
        "head_bytes": sizes[-1],
        "fractions": {
            "residual": fractions.residual,
            "logits": fractions.logits,
            **{f"layers.{n}.mixer": bits for n, bits in enumerate(fractions.mixer)},
            **{f"layers.{n}.channel": bits for n, bits in enumerate(fractions.channel)},
        },
    }
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": reader.fingerprint,
        "design_hash": design_hash(design),
        "design": dataclasses.asdict(design),
        "vocabulary": len(model.network.embedding),
        "summary": summary,
        "regions": [region.to_dict() for region in image.regions],
        "values": [list(step.values) for step in steps],
    }
    text = json.dumps(values, indent=1)
    (directory / MAP_FILE).write_text(text + "\n", encoding="utf-8")
    return summary


def open_compiled(directory: str | Path) -> Compiled:
    """Read what `compile_model` wrote. Raises ValueError where it did not write that."""
    path = Path(directory)
    try:
        compiled = _compiled(path, json.loads((path / MAP_FILE).read_text(encoding="utf-8")))
        size, expected = compiled.image_path.stat().st_size, compiled.image_bytes
    except OSError as error:
        raise ValueError(
            f"{path} is no compiled model: {error.filename}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no compiled model: {error}") from None
    if len(compiled.values) != len(compiled.program):
        raise ValueError(
            f"{path} is no compiled model: {len(compiled.program)} instructions, and names of"
            f" {len(compiled.values)}"
        )
    if size != expected:
        raise ValueError(
            f"{path} is no compiled model: {IMAGE_FILE} has {size} bytes, its regions {expected}"
        )
    return compiled


def _compiled(path: Path, values: Any) -> Compiled:
    """Of what map.json holds; ValueError where that is not what `describe` writes."""
    if not isinstance(values, dict):
        raise ValueError(f"{MAP_FILE} holds no object")
    found = (values.get("format"), values.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"its format is {found}, not {(FORMAT, FORMAT_VERSION)}")
    try:
        design = Design(**values["design"])
        regions = tuple(Region(**region) for region in values["regions"])
        names = tuple(tuple(map(str, names)) for names in values["values"])
        sizes = [
            values["vocabulary"],
            *(number for r in regions for number in (r.address, r.words)),
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MAP_FILE} is damaged ({error})") from None
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{MAP_FILE} is damaged (a size that is no whole number)")
    if values.get("design_hash") != design_hash(design):
        raise ValueError(f"{MAP_FILE} is damaged (the design is not that of its checksum)")
    program = read_program(path / PROGRAM_FILE)
    summary = values.get("summary")
    if not isinstance(summary, dict):
        raise ValueError(f"{MAP_FILE} is damaged (no summary)")
    return Compiled(path, design, program, names, regions, values["vocabulary"], summary)


def read_program(path: Path) -> tuple[Instruction, ...]:
    """The instructions of a program.bin; ValueError names the first that is none."""
    data = path.read_bytes()
    if not data or len(data) % _BYTES:
        raise ValueError(f"{path} has {len(data)} bytes; a program has {_BYTES} an instruction")
    program = []
    for at in range(0, len(data), _BYTES):
        try:
            program.append(decode(int.from_bytes(data[at : at + _BYTES], "little")))
        except ValueError as error:
            raise ValueError(f"{path}: instruction {at // _BYTES}: {error}") from None
    return tuple(program)


def listing(file: str | Path) -> list[dict[str, Any]]:
    """Of a compiled directory or a program.bin: index, text and names of each instruction."""
    path = Path(file)
    if path.is_dir():
        compiled = open_compiled(path)
        program, values = compiled.program, compiled.values
    else:
        program = read_program(path)
        values = ((),) * len(program)
    return [
        {"index": index, "text": disassemble(instruction), "values": list(names)}
        for index, (instruction, names) in enumerate(zip(program, values, strict=True))
    ]
