"""Compile a packed model for a design: all files, or none and one line that says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nomatmul.formats.files.atomic import named
from nomatmul.formats.files.directory import new_directory
from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.compile.check import Memory, check_program
from nomatmul.hardware.compile.files import IMAGE_FILE, describe, write_program
from nomatmul.hardware.compile.image import Image
from nomatmul.hardware.compile.program import Builder
from nomatmul.hardware.design import Design
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.numerics import Formats

_WIDTHS = [field.name for field in dataclasses.fields(Formats)]


def formats_of(design: Design) -> Formats:
    """The widths of a design as the integer model has them; ValueError for those that it lacks."""
    return Formats(**{name: getattr(design, name) for name in _WIDTHS})


def compile_model(
    reader: PackedReader,
    design: Design,
    out: str | Path,
    *,
    memory_bytes: int | None = None,
    model: IntegerModel | None = None,
) -> dict[str, Any]:
    """Write program.bin, image.bin and map.json to the new directory `out`; return the map's
    summary.

    memory_bytes: what the board has, None for no limit. model: the reader's integer model, where
    the caller has made it already. Raises ValueError for a model that has a part which the
    accelerator lacks, that could overflow or does not fit the design (naming what it needs and the
    limit), and where `out` exists; nothing is left behind then.
    """
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} exists; give the name of a new directory")
    if model is None:
        model = IntegerModel.from_packed(reader, formats_of(design))
    with new_directory(target) as made:
        try:
            with open(made / IMAGE_FILE, "wb") as file:
                image = Image(file, design, memory_bytes)
                steps = Builder(model, design, image).build()
        except OSError as error:  # a full disk is reported without a name
            raise named(error, target / IMAGE_FILE) from None
        program = [step.instruction for step in steps]
        vocabulary = len(model.network.embedding)
        check_program(program, design, Memory(image.regions, image.words, vocabulary))
        write_program(made, program)
        return describe(made, reader, model, design, image, steps)
