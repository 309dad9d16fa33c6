"""Command lines from dataclasses, with the standard library's argparse.

A subcommand is a module with `Options` (a frozen dataclass whose fields are made by `option`),
`EXAMPLES` (text shown under --help) and `run(options) -> int | None`. tyro does the same from type
hints but takes 100 ms to import, argparse 11 ms: docs/design.md has the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any


class HelpShown(Exception):
    """Raised in place of argparse's exit when --help was asked for; carries the text."""

    def __init__(self, text: str) -> None:
        super().__init__("help")
        self.text = text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{self.prog.removeprefix('nomatmul ')}: {message} (try --help)")

    def print_help(self, file: Any = None) -> None:
        raise HelpShown(self.format_help())


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    positional: bool = False,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    type: Callable[[str], Any] | None = None,
    nargs: str | None = None,
) -> Any:
    """A dataclass field that becomes one argument.

    default: absent means the argument is required. help: one sentence. positional: taken by place,
    not by flag. choices: the legal values. type: converts the text (None: from the annotation).
    nargs: "+" takes several values after one flag; without it a tuple's flag may be repeated. A
    positional tuple takes any number of values.
    """
    metadata = {
        "help": help,
        "positional": positional,
        "metavar": metavar,
        "choices": choices,
        "type": type,
        "nargs": nargs,
    }
    return dataclasses.field(default=default, metadata=metadata)


def json_option() -> Any:
    """The `--json` flag, the same words in every subcommand."""
    return option(False, help="print one JSON object instead of text")


def kv_option() -> Any:
    """How keys and values are kept (`KV_FORMS`), the same words in every subcommand."""
    return option(
        "f16",
        choices=("f16", "int8", "f32"),
        help="how a model with attention keeps keys and values: int8 takes half of f16's memory and"
        " moves the logits a little (`pack` says how far), f32 takes twice and rounds nothing",
    )


def parse(name: str, module: Any, arguments: Sequence[str]) -> Any:
    """Parse `arguments` into `module.Options`.

    Raises ValueError for what does not parse, HelpShown for --help.
    """
    parser = build_parser(name, module)
    several = any(action.nargs == "*" for action in parser._actions)
    # between flags, too: argparse otherwise takes those in front of the first flag only
    read = parser.parse_intermixed_args if several else parser.parse_args
    values = vars(read(list(arguments)))
    given = {key: value for key, value in values.items() if value is not None}
    return module.Options(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    )


def build_parser(name: str, module: Any) -> argparse.ArgumentParser:
    """The argparse parser of one subcommand's module."""
    parser = _Parser(
        prog=f"nomatmul {name}",
        description=(module.__doc__ or "").strip(),
        epilog=module.EXAMPLES.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(module.Options)
    for field in dataclasses.fields(module.Options):
        _add_argument(parser, field, hints[field.name])
    return parser


def _add_argument(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any
) -> None:
    meta = field.metadata
    text = meta.get("help", "").replace("%", "%%")
    required = field.default is dataclasses.MISSING
    if meta.get("positional"):
        metavar = meta.get("metavar") or field.name.upper()
        optional: dict[str, Any] = {} if required else {"nargs": "?", "default": field.default}
        if typing.get_origin(hint) is tuple:
            optional["nargs"] = "*"
        convert = meta.get("type") or _converter(hint, metavar)
        parser.add_argument(field.name, metavar=metavar, help=text, type=convert, **optional)
        return
    flag = "--" + field.name.replace("_", "-")
    if hint is bool:
        action = argparse.BooleanOptionalAction if field.default is True else "store_true"
        parser.add_argument(flag, dest=field.name, action=action, default=field.default, help=text)
        return
    many: dict[str, Any] = {}
    if typing.get_origin(hint) is tuple and meta.get("type") is None:
        many = {"nargs": meta["nargs"]} if meta.get("nargs") else {"action": "append"}
    if not required and field.default not in (None, "", ()):
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        show = size_text if meta.get("type") is byte_count else str
        text += f" (default {','.join(map(show, values))})"
    metavar = meta.get("metavar") or field.name.upper()
    parser.add_argument(
        flag,
        dest=field.name,
        **many,
        required=required,
        default=None if required or field.default in ((), "") else field.default,
        type=meta.get("type") or _converter(hint, metavar),
        choices=meta.get("choices"),
        metavar=None if meta.get("choices") else metavar,
        help=text,
    )


def _converter(hint: Any, metavar: str) -> Callable[[str], Any]:
    """The function that reads one value of a type hint (`int | None` reads an int).

    What is called TEXT may be empty; names and paths may not.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if hint is int:
        return integer
    if hint is float:
        return real
    return str if metavar == "TEXT" else named


def named(text: str) -> str:
    """A name or a path. An empty one, a shell's variable that is not set, would be taken for the
    working directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def integer(text: str) -> int:
    """A whole number, with the complaint in words a user reads."""
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def real(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def byte_count(text: str) -> int:
    """A size: `1GiB` and `512M` count in 1024s, `1GB` in 1000s, a number alone is bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(iB|B)?", text.strip(), re.IGNORECASE)
    if match is None or (match[2] == "" and "." in match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GiB, 512MiB or 0")
    base = 1000 if match[2] and (match[3] or "").upper() == "B" else 1024
    return int(float(match[1]) * base ** _UNITS[match[2].upper()])


def size_text(count: int) -> str:
    """The shortest text that `byte_count` reads as this size: `1GiB`."""
    for unit, power in reversed(_UNITS.items()):
        if unit and count and count % 1024**power == 0:
            return f"{count // 1024**power}{unit}iB"
    return str(count)


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, at least one, each positive: `1,2`."""
    numbers = tuple(integer(part) for part in text.split(",") if part.strip())
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2 of numbers from 1")
    return numbers
