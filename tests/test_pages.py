"""README and docs: links lead somewhere, and commands are those that the package has."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomatmul import cli
from nomatmul.cli.options import HelpShown, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "src/nomatmul/box/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "studies").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
# of a command in words, without what it takes: "`nomatmul train` writes"
SHELL_LINE = re.compile(r"^\s*(?:\$ )?(?:.*&& )?(?:\S*/)?nomatmul ([a-z].*)$", re.MULTILINE)
INLINE = re.compile(r"`nomatmul ([a-z][^`]*)`")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    found = set()
    for words in re.findall(r"^#+\s+(.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def dead_links(page: Path) -> Iterator[str]:
    for target in ("".join(pair) for pair in LINK.findall(FENCED.sub("", page.read_text("utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            yield target


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command line of ours in a page that has more than the command's name."""
    text = text.replace("\\\n", " ")
    for line in [*SHELL_LINE.findall(text), *INLINE.findall(text)]:
        words = shlex.split(re.split(r"\s{2,}|\s#\s|\s[|>]\s|&&", line)[0])
        if words[0] == "hardware":
            words[:2] = [" ".join(words[:2])]
        if len(words) > 1 and "..." not in words:
            yield words


def refusal(words: list[str]) -> str | None:
    """Why the command line does not parse, or None."""
    leaves = cli.leaf_commands()
    if words[0] not in leaves:
        return f"{words}: no command"
    try:
        parse(words[0], importlib.import_module(f"nomatmul.cli.{leaves[words[0]]}"), words[1:])
    except HelpShown:
        return None
    except ValueError as error:
        # a command in a sentence may leave out what it must have
        return None if "are required" in str(error) else f"{words}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_of_a_page(page):
    assert list(dead_links(page)) == []
    assert [why for why in map(refusal, commands(page.read_text("utf-8"))) if why] == []


def test_pages_hold_many_commands():
    assert sum(len(list(commands(page.read_text("utf-8")))) for page in PAGES) > 40


def test_what_is_wrong_in_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Two words\n[a](#two-words) [b](#none) [c](gone.md) [d](https://x.org)\n")
    assert list(dead_links(page)) == ["#none", "gone.md"]
    text = "    $ nomatmul footprint MODEL   # bytes\n`nomatmul bench --sizes 2.7B`\n"
    assert [refusal(words) for words in commands(text)] == [
        "['footprint', 'MODEL']: footprint: unrecognized arguments: MODEL (try --help)",
        "['bench', '--sizes', '2.7B']: bench: unrecognized arguments: --sizes 2.7B (try --help)",
    ]
