"""What a clone must hold: small recorded files, honest skips, and a lock of every version."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MB = 10**6


def test_recorded_files_are_small_and_described():
    sizes = {path: path.stat().st_size for path in (TESTS / "golden").rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 15 * MB
    assert [path for path, size in sizes.items() if size > 4 * MB] == []
    folders = {
        path.relative_to(TESTS / "golden").parts[0] for path in sizes if path.suffix != ".py"
    }
    page = (TESTS / "golden" / "README.md").read_text()
    assert [
        name for name in folders - {"README.md", "__pycache__"} if f"`{name}`" not in page
    ] == []


def test_no_test_skips_for_a_missing_package():
    """The extras install what tests import: a broken installation must fail."""
    word = "import" + "orskip"
    assert [p for p in TESTS.rglob("*.py") if word in p.read_text(encoding="utf-8")] == []


def locked(name: str) -> dict[str, list[Requirement]]:
    """Return the pinned requirements of a lock by package."""
    text = re.sub(r"#.*|\\\n *--hash=\S+", "", (ROOT / "requirements" / name).read_text())
    found: dict[str, list[Requirement]] = {}
    for line in filter(str.strip, text.splitlines()):
        requirement = Requirement(line)
        found.setdefault(requirement.name, []).append(requirement)
    return found


def wanted() -> list[tuple[str, Requirement]]:
    """Return the package's direct requirements, each with the table of pyproject.toml it is in."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = {"dependencies": document["project"]["dependencies"]}
    tables |= document["project"]["optional-dependencies"] | document["dependency-groups"]
    return [
        (table, Requirement(words))
        for table in ("dependencies", "build", "train", "serve", "eval", "hardware", "test", "dev")
        for words in tables[table]
        if not words.startswith(("nomatmul", "torch>"))
    ]


@pytest.mark.parametrize("name", ["base.txt", "dev.txt"])
def test_a_lock_pins_each_file_and_names_no_index(name):
    text = (ROOT / "requirements" / name).read_text()
    assert not re.search(r"https?:|://|--(extra-)?index-url|--find-links", text)
    for pins in locked(name).values():
        for pin in pins:
            assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), pin
    entries = re.split(r"^(?=[a-z])", text, flags=re.M)[1:]
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_locks_hold_what_pyproject_asks_for():
    """A changed bound needs `make lock`."""
    base, dev = locked("base.txt"), locked("dev.txt")
    assert len(wanted()) > 25
    for table, requirement in wanted():
        for lock in (base, dev) if table in ("dependencies", "build") else (dev,):
            assert requirement.name in lock, f"{requirement} of {table}"
            for pin in lock[requirement.name]:
                version = str(pin.specifier).removeprefix("==")
                assert requirement.specifier.contains(version), f"{pin}, but {requirement}"
    for name, pins in base.items():
        assert [str(pin.specifier) for pin in pins] == [str(pin.specifier) for pin in dev[name]]


def imported(tree: ast.AST, modules: Container[str]) -> Iterator[str]:
    """What a file imports, in functions and for type checkers too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in modules else node.module
        yield from imported(node, modules)


def file_circle(root: Path) -> list[str]:
    """Files below `root` that import one another in a circle; none if there is no circle."""
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.py")}
    modules = {name.removesuffix("/__init__").replace("/", "."): p for name, p in files.items()}
    known = {*modules, "nomatmul._native"}  # the extension imports none of ours
    graph = {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), known)) & set(modules)
        for name, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_one_another():
    assert len(list((ROOT / "src").rglob("*.py"))) > 150
    assert file_circle(ROOT / "src") == []


def test_a_circle_of_files_is_found(tmp_path):
    (tmp_path / "one.py").write_text("def f():\n    from two import g\n")
    (tmp_path / "two.py").write_text("g = 1\n")
    assert file_circle(tmp_path) == []
    (tmp_path / "two.py").write_text("if TYPE_CHECKING:\n    import one\n")
    assert {"one", "two"} == set(file_circle(tmp_path))


@pytest.mark.parametrize("name", ["", "convert", "engine", "train"])
def test_type_checkers_see_what_is_imported_when_used(name):
    """A `__getattr__` gives them Any: each name that it serves is imported for them, too."""
    text = (ROOT / "src" / "nomatmul" / name / "__init__.py").read_text("utf-8")
    homes: set[str] = set()
    seen: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            assert isinstance(node.value, ast.Dict)
            homes = {ast.literal_eval(key) for key in node.value.keys if key is not None}
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            seen = {a.name for each in node.body for a in getattr(each, "names", ())}
    assert homes
    assert homes <= seen
