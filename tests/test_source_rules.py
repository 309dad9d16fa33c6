"""Rules of the package's source that no linter holds: reasons, lengths, prints, names in pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "nomatmul"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

SILENCED = re.compile(r"#\s*(noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*|type: ignore\[[\w,-]+\])")
BROAD = {"Exception", "BaseException"}
# Beside the commands (cli/) and programs (`python -m`): what must be said while a call goes on.
PRINTING = {
    "convert/hub.py",
    "convert/progress.py",
    "evaluate/compare_runs.py",
    "evaluate/speed.py",
    "formats/hub.py",
    "hardware/board/host.py",
    "hardware/synthesis/output_registers.py",
    "hardware/tables.py",
    "train/main.py",
    "train/metrics.py",
    "train/watch.py",
}
LONGEST = 410  # lines; 300 is what a file should have


def silenced_without_reason(text: str) -> list[int]:
    """Lines that silence a linter or mypy, and neither they nor a comment above say why."""
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines):
        match = SILENCED.search(line)
        if match is None:
            continue
        above = number - 1
        while SILENCED.search(lines[above]):  # a reason may stand for several lines
            above -= 1
        beside = SILENCED.sub("", line[match.start() :])
        if not re.search(r"\w", beside) and not lines[above].lstrip().startswith("#"):
            found.append(number + 1)
    return found


def broad_without_reason(text: str) -> list[int]:
    """Handlers of whatever is raised that do not raise, and whose line does not say why."""
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = (
            {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else BROAD
        )
        raises = any(isinstance(n, ast.Raise) for part in node.body for n in ast.walk(part))
        if kinds & BROAD and not raises and "#" not in lines[node.lineno - 1]:
            found.append(node.lineno)
    return found


def prints(text: str) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)


def texts() -> dict[str, str]:
    assert len(FILES) > 400
    return {name: path.read_text("utf-8") for name, path in FILES.items()}


@pytest.mark.parametrize("rule", [silenced_without_reason, broad_without_reason])
def test_what_is_silenced_says_why(rule):
    found = {name: rule(text) for name, text in texts().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_missing_reason_is_found():
    quiet = (
        "x = 1  # noqa: E501\n# a reason\ny = 1  # type: ignore[arg-type]\nz = 1  # noqa: F401\n"
    )
    assert silenced_without_reason("\n" + quiet) == [2]
    assert silenced_without_reason("\nx = 1  # type: ignore[a-b]  # noqa: F401\n") == [2]
    assert silenced_without_reason("\nx = 1  # type: ignore[a-b]  # theirs has no types\n") == []
    handler = "try:\n    f()\nexcept Exception{}:\n    {}\n"
    assert broad_without_reason(handler.format("", "pass")) == [3]
    assert broad_without_reason(handler.format(" as e", "raise ValueError from e")) == []
    assert broad_without_reason("try:\n    f()\nexcept:  # why\n    pass\n") == []


def test_only_commands_and_these_print():
    found = {name for name, text in texts().items() if prints(text)}
    assert {name for name in found if not name.startswith("cli/")} - PRINTING == set()
    assert any(name.startswith("cli/") for name in found)


def test_files_have_one_idea():
    """A file that passes the limit holds several: cut it where they part."""
    lengths = {name: text.count("\n") for name, text in texts().items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`([\w./-]+\.(?:py|cc|h|cu|cuh))`")
# Not of this repository, or a place for a name.
FOREIGN = {"formats/published/NAME.py", "layers.N.mixer.h"}


def test_pages_name_files_that_exist():
    rooms = ("src", "csrc", "tests", "benchmarks", "studies", "docs")
    known = [
        "/" + p.relative_to(ROOT).as_posix() for room in rooms for p in (ROOT / room).rglob("*.*")
    ]
    named = {(page.name, name) for page in PAGES for name in NAMED.findall(page.read_text("utf-8"))}
    assert len(named) > 50
    missing = {
        (page, name)
        for page, name in named
        if name not in FOREIGN and not any(path.endswith("/" + name) for path in known)
    }
    assert missing == set()
