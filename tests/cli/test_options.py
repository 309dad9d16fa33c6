"""The list of options is an interface: a change of it must be meant, and shows up here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from nomatmul import cli
from nomatmul.cli.options import build_parser, byte_count, integers, option, parse
from nomatmul.evaluate.speed import SIZES

FROZEN = Path(__file__).with_name("options.txt")


def _listing() -> str:
    lines = []
    for name, module_name in cli.leaf_commands().items():
        module = importlib.import_module(f"nomatmul.cli.{module_name}")
        for action in build_parser(name, module)._actions:
            words = "/".join(action.option_strings) or action.dest
            if words != "-h/--help":
                lines.append(f"{name} {words}")
    return "\n".join(lines) + "\n"


def test_options_are_the_frozen_ones():
    assert _listing() == FROZEN.read_text()


def test_the_help_of_bench_names_every_size():
    explained = build_parser("bench", importlib.import_module("nomatmul.cli.bench")).description
    for name in SIZES:
        assert name in explained


@dataclass(frozen=True, kw_only=True)
class Sample:
    place: str = option(positional=True, help="where")
    count: int | None = option(None, help="how many, 100 % of them")
    share: float = option(0.5, help="a share")
    words: tuple[str, ...] = option((), help="repeatable")
    files: tuple[str, ...] = option(("a",), nargs="+", help="several")
    sizes: tuple[int, ...] = option((1,), type=integers, help="with commas")
    fast: bool = option(False, help="off by default")
    check: bool = option(True, help="on by default")


@dataclass(frozen=True, kw_only=True)
class Many:
    places: tuple[str, ...] = option((), positional=True, help="any number")
    room: int = option(0, type=byte_count, help="a size")


MANY = SimpleNamespace(Options=Many, EXAMPLES="examples:", __doc__="Another.")
MODULE = SimpleNamespace(Options=Sample, EXAMPLES="examples:", __doc__="A sample.")


def test_defaults_come_from_the_dataclass():
    assert parse("sample", MODULE, ["here"]) == Sample(place="here")


def test_every_kind_of_field_is_read():
    words = "here --count 1_000 --share 2 --words x --words y --files p q --sizes 1,2"
    options = parse("sample", MODULE, [*words.split(), "--fast", "--no-check"])
    assert options == Sample(
        place="here",
        count=1000,
        share=2.0,
        words=("x", "y"),
        files=("p", "q"),
        sizes=(1, 2),
        fast=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: PLACE"),
        (["here", "--share", "half"], "'half' is not a number"),
        (["here", "--sizes", "1,0"], "'1,0' is not a list"),
        (["here", "--sizes", "1,x"], "'x' is not a whole number"),
        (["here", "there"], "unrecognized arguments: there"),
    ],
)
def test_mistakes_are_value_errors_that_name_the_value(words, message):
    with pytest.raises(ValueError, match=message):
        parse("sample", MODULE, words)


def test_a_positional_tuple_takes_any_number():
    assert parse("many", MANY, []) == Many()
    assert parse("many", MANY, ["a", "--room", "1", "b"]).places == ("a", "b")
    assert parse("many", MANY, ["a", "b"]).places == ("a", "b")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("12", 12), ("1GiB", 1 << 30), ("1 GiB", 1 << 30), ("512M", 512 << 20)),
        *(("1.5GiB", 3 << 29), ("2gb", 2 * 10**9), ("16MB", 16 * 10**6), ("3k", 3072)),
    ],
)
def test_sizes_have_units(text, size):
    assert parse("many", MANY, ["--room", text]).room == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1.5", "GiB", "1GiBs", "one", "1e9", "nan", "1 2", "1Gi"]
)
def test_nonsense_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size such as 1GiB"):
        parse("many", MANY, [f"--room={text}"])


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["generate", "The", "--model", ""], "--model"),
        (["pack", "", "packed"], "SRC"),
        (["pack", "run", ""], "DST"),
        (["eval", "--text", "a.txt", "--model", ""], "--model"),
        (["serve", ""], "MODEL"),
        (["serve", "--host", ""], "--host"),
    ],
)
def test_an_empty_name_is_not_the_working_directory(run, words, argument):
    """A shell's variable that is not set; a host without name would be every address."""
    done = run(*words)
    assert (done.status, done.out) == (1, "")
    assert f"argument {argument}: it is empty" in done.err


def test_texts_may_be_empty():
    module = importlib.import_module("nomatmul.cli.chat")
    options = parse("chat", module, ["--prefix", "", "--system", "", "--suffix", "x"])
    assert (options.prefix, options.system, options.suffix) == ("", "", "x")
