"""The dispatcher: help, unknown words, exit statuses; no model needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nomatmul import cli


@pytest.mark.parametrize("name", [*cli.COMMANDS, *cli.leaf_commands()])
def test_help_teaches_by_examples(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: nomatmul {name}")
    assert f"examples:\n  nomatmul {name}" in out


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name}" in out
        assert summary in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generatee"], "unknown command 'generatee'"),
        (["generate"], "there is no prompt"),
        (["generate", "--prompt", "x", "--max-tokens", "many"], "'many' is not a whole number"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "'nan' is not a finite number"),
        (["generate", "--prompt", "x", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate", "--prompt", "x", "--max", "3"], "unrecognized arguments"),
        (["pack", "here"], "required: DST"),
        (["pack", "a", "b", "--packing", "3bit"], "invalid choice: '3bit'"),
        (["bench", "--threads", "0"], "'0' is not a list"),
    ],
)
def test_wrong_words_exit_1_with_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("nomatmul: error: ")
    assert message in lines[0]


def _replace_run(monkeypatch, error):
    def run(options):
        raise error

    from nomatmul.cli import footprint

    monkeypatch.setattr(footprint, "run", run)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 1, "nomatmul: error: two lines"),
        (FileNotFoundError(2, "No such file", "x"), 1, "nomatmul: error: x: No such file"),
        (KeyError("k"), 1, "nomatmul: error: internal error, please report: KeyError: 'k'"),
        (MemoryError("8 GB"), 1, "nomatmul: error: out of memory (8 GB)"),
        (KeyboardInterrupt(), 130, "nomatmul: interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_one_line(monkeypatch, capsys, error, status, line):
    monkeypatch.delenv("NOMATMUL_DEBUG", raising=False)
    _replace_run(monkeypatch, error)
    assert cli.main(["footprint"]) == status
    assert capsys.readouterr().err.strip() == line


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("NOMATMUL_DEBUG", "1")
    _replace_run(monkeypatch, ValueError("seen"))
    with pytest.raises(ValueError, match="seen"):
        cli.main(["footprint"])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nomatmul.cli import main; main(['generate', '--help']);"
        "heavy = {'numpy', 'torch', 'tokenizers', 'tyro'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    import nomatmul

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nomatmul {nomatmul.__version__}\n"
