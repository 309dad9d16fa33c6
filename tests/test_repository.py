"""What a clone must hold: small recorded files, and tests that skip for the machine's sake only."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
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
