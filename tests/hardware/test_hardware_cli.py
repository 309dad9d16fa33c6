"""`nomatmul hardware`: what its commands print, and how they fail."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hardware.conftest import SMALL
from hardware.models import trained_model

from nomatmul import cli
from nomatmul.hardware import tools
from nomatmul.hardware.compile import compiler
from nomatmul.hardware.simulate import build

# The design of the fixture, as a command line has it.
_OWN = ("lanes", "memory_bits")
DESIGN = [f"--lanes={SMALL['lanes']}", f"--memory-bits={SMALL['memory_bits']}"]
DESIGN += [f"--set={name}={value}" for name, value in SMALL.items() if name not in _OWN]


def _json(capsys, *words):
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys, *words):
    assert cli.main(["hardware", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("nomatmul: error: ")
    return line


def test_compile_and_disassemble(tmp_path, capsys):
    packed, out = str(trained_model("glu")), str(tmp_path / "out")
    summary = _json(capsys, "hardware", "compile", packed, out, *DESIGN)
    program = _json(capsys, "hardware", "disassemble", out)["program"]
    assert summary["instructions"] == len(program)
    assert program[-1]["text"].startswith("JUMP")
    assert cli.main(["hardware", "disassemble", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(program)
    assert any("; layers.0.mixer.h, layers.0.mixer.g, layers.0.mixer.u" in line for line in lines)


def test_compile_takes_the_model_in_the_box(tmp_path, capsys):
    assert cli.main(["hardware", "compile", str(tmp_path / "out")]) == 0
    assert "streamed a token" in capsys.readouterr().out


@pytest.mark.usefixtures("simulated")
def test_simulate_checks_every_value(capsys):
    packed = str(trained_model("trees"))
    words = ["simulate", packed, "--prompt", "the model", "--max-tokens", "3", "--check"]
    found = _json(capsys, "hardware", *words, *DESIGN, "--stalls", "3")
    assert found["text"]
    assert found["equal"] is True
    assert found["values_compared"] > 1000
    assert found["tokens"] == 3
    causes = found["cycles_by_cause"]
    assert abs(sum(causes.values()) - found["cycles"]) <= 2 * (found["prompt_tokens"] + 3)
    assert cli.main(["hardware", *words, *DESIGN, "--stalls", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(found["text"])
    assert "is equal" in out


@pytest.mark.usefixtures("simulated")
def test_a_plot_is_drawn(tmp_path, capsys):
    packed, picture = str(trained_model("trees")), tmp_path / "busy.png"
    words = ["--prompt", "the", "--max-tokens", "1", "--check", "--plot", str(picture)]
    _json(capsys, "hardware", "simulate", packed, *words, *DESIGN)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compil"], "unknown command 'hardware compil'"),
        (["compile"], "required: OUT"),
        (["compile", "out", "--lanes", "33"], "lanes is 33"),
        (["compile", "out", "--set", "lane=3"], "one of activation_beats"),
        (["compile", "out", "--set", "burst"], "it must be NAME=VALUE"),
        (["compile", "out", "--set", "burst=x"], "'x' is not a whole number"),
        (["compile", "out", "--set", "trees=true"], "it must be NAME=VALUE of one of"),
        (["compile", "missing", "out"], "missing does not exist"),
        (["disassemble", "missing"], "missing: No such file"),
        (["simulate", "--prompt", "x", "--bytes-a-cycle", "-1"], "bytes_a_cycle is -1"),
        (["simulate", "--prompt", "x", "--vcd", "a", "--fst", "b"], "asked for twice"),
        (["simulate", "--prompt", "x", "--board", "ulx3"], "ulx3"),
        (["simulate", "--prompt", "x", "--board", "ulx3s", "--bytes-a-cycle", "1"], "given twice"),
        (["compile", "out", "--board", "ulx3"], "ulx3"),
        (["simulate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["simulate", "--prompt", "x", "--threads", "0"], "threads is 0"),
        (["verilog", "out", "--lanes", "31"], "lanes is 31"),
        (["report", "--board", "ulx3"], "ulx3"),
        (["simulate"], "required: --prompt"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert message in _error(capsys, *words)


def test_verilog_and_report(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["hardware", "verilog", str(out), "--board", "core", *DESIGN]
    assert _json(capsys, *words)["board"] == "core"
    assert "module core" in (out / "core.v").read_text()
    found = _json(capsys, "hardware", "report", str(trained_model("glu")), "--board", "ulx3s")
    assert len(found["boards"]) == 1
    assert cli.main(["hardware", "report", str(trained_model("glu"))]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["yosys", "verilator", "perl", "g++", "make"])
def test_a_missing_tool_is_named_before_anything_is_built(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv("NOMATMUL_CACHE", str(tmp_path / "cache"))
    found = tools.shutil.which
    absent = {name, f"yowasp-{name}", f"{name}-cli"}
    monkeypatch.setattr(
        tools.shutil, "which", lambda word, **kw: None if word in absent else found(word, **kw)
    )
    words = ["simulate", str(trained_model("glu")), "--prompt", "the", *DESIGN]
    line = _error(capsys, *words)
    assert name in line
    assert ("nomatmul[hardware]" in line) == (name in ("yosys", "verilator"))
    assert not (tmp_path / "cache").exists()


def test_a_missing_header_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NOMATMUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FST_HEADERS", (("no_such_header.h", "libnothing-dev"),))
    words = ["simulate", str(trained_model("glu")), "--prompt", "the", *DESIGN]
    line = _error(capsys, *words, "--fst", str(tmp_path / "waves.fst"))
    assert "a waveform in FST (unlike one in VCD) needs no_such_header.h" in line
    assert "libnothing-dev" in line
    assert not (tmp_path / "cache").exists()
    tools.require_header("vector", "g++", "C++")


def test_a_missing_matplotlib_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["simulate", str(trained_model("glu")), "--prompt", "the", "--plot", "x.png"]
    assert "a plot needs matplotlib" in _error(capsys, *words)


def test_help_starts_without_the_hardwares_packages():
    code = (
        "import sys; from nomatmul import cli; cli.main(['hardware', '--help']);"
        "cli.main(['hardware', 'simulate', '--help']);"
        "print([m for m in ('numpy', 'amaranth', 'nomatmul.hardware') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def _compiled(tmp_path, capsys):
    out = tmp_path / "compiled"
    _json(capsys, "hardware", "compile", str(trained_model("glu")), str(out), *DESIGN)
    return out


def _shorter(path):
    path.write_bytes(path.read_bytes()[:-64])


def _changed(path, key, value):
    values = json.loads(path.read_text())
    values[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "map.json").write_text("[]"), "map.json holds no object"),
        (lambda at: (at / "map.json").write_text("{}"), "its format is (None, None)"),
        (lambda at: (at / "map.json").unlink(), "map.json: No such file"),
        (lambda at: _changed(at / "map.json", "vocabulary", "x"), "no whole number"),
        (lambda at: _changed(at / "map.json", "regions", [{"a": 1}]), "map.json is damaged"),
        (lambda at: _changed(at / "map.json", "values", [3]), "map.json is damaged"),
        (lambda at: _changed(at / "map.json", "design", {}), "not that of its checksum"),
        (lambda at: _changed(at / "map.json", "summary", None), "no summary"),
        (lambda at: _shorter(at / "program.bin"), "instructions, and names of"),
        (lambda at: _shorter(at / "image.bin"), "image.bin has"),
        (lambda at: (at / "image.bin").unlink(), "image.bin: No such file"),
    ],
)
def test_damaged_files_of_a_compiled_model_are_named(tmp_path, capsys, damage, message):
    out = _compiled(tmp_path, capsys)
    damage(out)
    assert message in _error(capsys, "disassemble", str(out))
    words = ["verilog", str(tmp_path / "out"), "--board", "core", "--on-chip", str(out)]
    assert message in _error(capsys, *words)
    assert sorted(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x", "--top-k", "-1"], "top_k must be"),
        (["--prompt", "x", "--plot", "picture"], "must end in one of"),
        (["--prompt", "x", "--plot", "missing/a.png"], "missing is no directory"),
        (["--prompt", "x", "--vcd", "missing/a.vcd"], "missing is no directory"),
        (["--prompt", "x", "--vcd", "."], "is a directory"),
    ],
)
def test_mistakes_are_found_before_a_simulation_is_built(
    tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.setenv("NOMATMUL_CACHE", str(tmp_path / "cache"))
    assert message in _error(capsys, "simulate", str(trained_model("glu")), *words, *DESIGN)
    assert not (tmp_path / "cache").exists()


def test_verilog_says_what_it_waits_for_and_lists_its_files(tmp_path, capsys):
    words = ["hardware", "verilog", str(tmp_path / "out"), "--board", "core", *DESIGN]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == "nomatmul: writing the Verilog of core, up to a minute\n"
    assert "README.md, core.v, design.json" in captured.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the machine has no /dev/full")
def test_a_full_disk_is_told_with_the_files_name(tmp_path, capsys, monkeypatch):
    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr(compiler, "open", lambda path, mode: full(mode), raising=False)
    line = _error(capsys, "compile", str(trained_model("glu")), str(tmp_path / "out"), *DESIGN)
    assert line.endswith("out/image.bin: No space left on device")
    assert list(tmp_path.iterdir()) == []
