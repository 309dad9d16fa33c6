"""Scripts in benchmarks/ and studies/ start: `--tiny` is a dry run on a CPU without other needs.

Scripts are found, not listed: a new one without --tiny fails here. All run in this process, one
after the other, so that torch is imported once; what they start are forks of a process that has
imported it, too (support/warm.py).
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

FILES = {path.stem: path.read_text("utf-8") for path in sorted(ROOT.glob("benchmarks/*.py"))}
FILES |= {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
    for path in sorted(ROOT.glob("studies/*/*.py"))
}
# The dry runs of these have tests of their own (tests/studies), with texts to clean or models to
# score; the last three are the processes of a pool and take no arguments.
OWN = {"studies.recipes.run", "studies.recipes.quantised", "studies.recipes.ternarise"}
OWN |= {"studies.compare.cell", "studies.recipes.trainer", "studies.fff.trainer"}
SCRIPTS = [name for name, text in FILES.items() if '__name__ == "__main__"' in text]
SCRIPTS = [name for name in SCRIPTS if name not in OWN]
# Where a dry run prints its result and writes nothing.
PRINTED = {"llama_side", "many_gpus_speed", "our_side", "pareto_side", "serve_decode_loop"}
PRINTED |= {"serve_picture", "studies.recipes.page"}


def test_what_is_no_script_says_so():
    for name in [name for name in FILES.keys() - set(SCRIPTS) if "." not in name]:
        assert "library" in (ast.get_docstring(ast.parse(FILES[name])) or "").lower(), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_needs_no_gpu_no_data_and_no_other_argument(
    name, tmp_path, capsys, monkeypatch, warm_python
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", beside)  # of tools that came with Python's packages
    monkeypatch.setattr(sys, "executable", warm_python)
    script = importlib.import_module(name)
    arguments = ["--tiny"] if name in PRINTED else ["--tiny", "--out", str(tmp_path / "out")]
    assert not script.main(arguments)
    assert capsys.readouterr().out.strip()
    if name not in PRINTED:
        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert written
        assert all(path.stat().st_size for path in written if path.suffix in (".md", ".json"))
        rows = [path.read_text() for path in written if path.name.endswith("rows.jsonl")]
        assert not any('"error"' in text for text in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_what_a_script_is_for(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--tiny" in shown
    first = (ast.get_docstring(ast.parse(FILES[name])) or "").split()[:4]
    assert first
    assert " ".join(first) in " ".join(shown.split())
