"""`nomatmul export`: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import write_tokenizer

from nomatmul.convert.export import export
from nomatmul.formats.checkpoint import open_checkpoint

MODEL = Path(__file__).resolve().parents[1] / "golden" / "exports" / "qwen3-128"


def test_a_file_and_what_is_said_of_it(run, tmp_path):
    done = run("export", MODEL, tmp_path / "x.gguf", "--type", "q2_0")
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert lines[0] == f"exported 1,263,104 parameters to {tmp_path / 'x.gguf'}"
    assert lines[1].split() == ["form", "gguf", "qwen3", "Q2_0"]
    assert lines[-1].startswith("note: scales of 14 matrices rounded to float16: by at most ")
    (tmp_path / "y").mkdir()
    again = export(MODEL, tmp_path / "y" / "x.gguf", type="q2_0")
    assert Path(again.destination).read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_json(run, tmp_path):
    done = run("export", MODEL, tmp_path / "out", "--json")
    report = json.loads(done.out)
    assert (report["to"], report["type"], report["family"]) == ("unpacked", "", "qwen3")
    assert report["exported_bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert 0 < report["scale_change"] <= 2**-11
    assert report["tokenizer"] == "copied"
    assert open_checkpoint(tmp_path / "out").config.scale_group == 128


def test_a_packed_directory_of_a_gguf_file(run, tmp_path):
    run("export", MODEL, tmp_path / "x.gguf")
    done = run("export", tmp_path / "x.gguf", tmp_path / "p", "--to", "packed", "--json")
    assert json.loads(done.out)["tokenizer"] == "gguf"
    text = run("generate", "--model", tmp_path / "p", "--prompt", "The", "--max-tokens", "3")
    assert text.status == 0


def test_warnings_go_to_stderr(run, tmp_path):
    done = run("export", MODEL.with_name("llama-tensor"), tmp_path / "x.gguf")
    (line,) = done.err.splitlines()
    assert done.status == 0
    assert line.startswith("nomatmul: warning: ")
    assert "computes with int8 activations a token; llama.cpp computes with int8 for each" in line


def _without(tmp_path, change):
    source = tmp_path / "source"
    shutil.copytree(MODEL, source)
    change(source)
    return source


def _truncated(source):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _flipped(source):
    """One byte of the embedding."""
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def _no_config(source):
    (source / "config.json").unlink()


DAMAGED = {
    "truncated": (_truncated, "truncated"),
    "flipped": (_flipped, "checksum"),
    "no config": (_no_config, "holds no model"),
}
OPTIONS = {
    "no such model": (["{nowhere}", "{out}"], "nowhere"),
    "unknown form": (["{model}", "{out}", "--to", "onnx"], "--to"),
    "unknown type": (["{model}", "{out}", "--type", "iq1"], "--type"),
    "not exact": (["{model}", "{out}", "--type", "tq2_0"], "no TQ2_0 holds exactly"),
    "no TQ2_0 elsewhere": (["{model}", "{dir}", "--type", "tq2_0"], "is of GGUF files"),
    "q8_0 elsewhere": (["{model}", "{dir}", "--embedding", "q8_0"], "'q8_0' does not go with"),
    "packed again": (["{model}", "{dir}", "--to", "packed"], "is packed already"),
    "suffix": (["{model}", "{dir}", "--to", "gguf"], "must end in .gguf"),
    "exists": (["{model}", "{model}"], "already exists"),
    "no OUT": (["{model}"], "OUT"),
    "bad Hub name": (["hf:owner", "{out}"], "hf:owner"),
}


@pytest.fixture
def refused(run):
    def refused(words, *arguments):
        done = run("export", *arguments)
        lines = done.err.splitlines()
        assert (done.status, done.out, len(lines)) == (1, "", 1), done
        assert lines[0].startswith("nomatmul: error: ")
        assert "internal error" not in lines[0]
        assert words in lines[0]

    return refused


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_arguments(refused, tmp_path, case):
    arguments, words = OPTIONS[case]
    names = {"model": MODEL, "nowhere": tmp_path / "nowhere"}
    names |= {"out": tmp_path / "x.gguf", "dir": tmp_path / "x"}
    refused(words, *(argument.format(**names) for argument in arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["x.gguf", "x"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_models(refused, tmp_path, case, target):
    change, words = DAMAGED[case]
    source = _without(tmp_path, change)
    refused(words, source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_kinds_of_models(refused, tmp_path, training, packed, crammed_tiny):
    for model in (training, packed):
        refused("token_mixer 'mlgru'", model, tmp_path / "x.gguf")
    refused("is an encoder", crammed_tiny, tmp_path / "x.gguf")
    source = _without(tmp_path, lambda source: None)
    (source / "model.safetensors").unlink()
    refused("model.safetensors", source, tmp_path / "x.gguf")


def test_a_foreign_tokenizer(refused, tmp_path):
    source = tmp_path / "source"
    export(MODEL, source)
    write_tokenizer(source)
    refused("a GGUF file has BPE", source, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A file may have 100 kB: as a disk does, the system refuses more."""
    code = (
        "import resource, signal, sys; from nomatmul.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    for target in ("x.gguf", "x"):
        words = [sys.executable, "-c", code, "export", str(MODEL), str(tmp_path / target)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("nomatmul: error: ")
        assert target in line
    assert list(tmp_path.iterdir()) == []
