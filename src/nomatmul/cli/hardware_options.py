"""What the commands of `nomatmul hardware` share: which model, and which design."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nomatmul.cli.options import option

if TYPE_CHECKING:
    from nomatmul.formats.packed import PackedReader
    from nomatmul.hardware.design import Design


def packed_option() -> Any:
    """The model by place; the one in the box where none is given."""
    return option(
        None,
        positional=True,
        metavar="PACKED",
        help="packed model directory, or hf:owner/name (default: the model in the box)",
    )


def board_option() -> Any:
    """A class of boards, whose memory counts."""
    return option(
        None,
        metavar="CLASS",
        help="a class of boards, such as ulx3s or ddr4-x64, whose memory it is (a wrong name lists"
        " them all)",
    )


@dataclass(frozen=True, kw_only=True)
class DesignOptions:
    """The parameters of a design that matter most, and a way to set the others."""

    lanes: int = option(256, metavar="N", help="ternary products a cycle, a multiple of 32")
    packing: str = option(
        "2bit",
        choices=("2bit", "1.6bit"),
        help="how weights lie in the accelerator's memory, whatever the packed model has",
    )
    memory_bits: int = option(512, metavar="N", help="width of the memory, a power of two")
    set: tuple[str, ...] = option(
        (),
        metavar="NAME=VALUE",
        help="another parameter of the design, such as vector_bits=28 or element_lanes=16; may be"
        " repeated (a wrong name lists them all)",
    )


def design_of(options: DesignOptions, reader: PackedReader | None, **fixed: Any) -> Design:
    """The design that the options describe, with the unit of trees where the model has some;
    `fixed` are values that the command decides.

    Raises ValueError naming the parameter, its value and its limits.
    """
    from nomatmul.formats.architecture import architecture_of
    from nomatmul.hardware.design import Design

    if reader is not None:
        fixed["trees"] = bool(architecture_of(reader.config).trees())

    values: dict[str, Any] = {
        name: getattr(options, name) for name in ("lanes", "packing", "memory_bits")
    }
    kinds = {field.name: field.default for field in dataclasses.fields(Design)}
    own = {*values, *fixed}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds or name in own:
            known = ", ".join(sorted(set(kinds) - own))
            raise ValueError(f"--set {text}: it must be NAME=VALUE of one of {known}")
        values[name] = _value(text, value, kinds[name])
    return Design(**values, **fixed)


def _value(text: str, value: str, default: Any) -> bool | int:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(f"--set {text}: the value must be true or false")
        return value == "true"
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--set {text}: {value!r} is not a whole number") from None


def open_packed(packed: str | None) -> PackedReader:
    """The packed model of a path, of a name on the Hub, or the one in the box."""
    from nomatmul.engine.loading import model_directory
    from nomatmul.formats.packed.reader import PackedReader

    return PackedReader(model_directory(packed))


def note(text: str) -> None:
    """Says on standard error what goes on when it takes time."""
    print(f"nomatmul: {text}", file=sys.stderr, flush=True)
