"""What reaches standard output in any encoding, through closed pipes, and from any argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_files import encoder_config, write_encoder
from model_files import write_published

from nomatmul.cli.terminal import WordWrap
from nomatmul.convert import pack
from nomatmul.evaluate.speed import batch_rates

NOMATMUL = [sys.executable, "-m", "nomatmul"]


def _run(*words: object, encoding: str = "utf-8", **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*NOMATMUL, *map(os.fsencode, map(str, words))],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=100,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A packed model whose words are not in Latin-1, greedy or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("wide")
    write_published(directory, np.random.default_rng(3), bos_token_id=None, eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({f"漢é{i}": i for i in range(48)}, unk_token="漢é0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    pack(directory, directory / "packed", check=False)
    return directory / "packed"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "latin-1:strict", "cp437"])
def test_what_an_encoding_lacks_is_replaced(wide, encoding):
    words = ("generate", "--model", wide, "漢é1", "--max-tokens", 3, "--temperature", 0, "--echo")
    whole = _run(*words)
    assert whole.returncode == 0
    assert whole.stdout.decode().startswith("漢é1 漢é")
    shown = _run(*words, encoding=encoding)
    assert (shown.returncode, shown.stderr) == (0, b"")
    codec = encoding.partition(":")[0]
    assert shown.stdout == whole.stdout.decode().encode(codec, "replace")


def test_json_is_json_in_any_encoding(wide):
    words = ("generate", "--model", wide, "漢é1", "--max-tokens", 3, "--temperature", 0, "--json")
    whole, plain = _run(*words), _run(*words, encoding="latin-1")
    expected = json.loads(whole.stdout)
    assert "漢é".encode() in whole.stdout
    again = json.loads(plain.stdout.decode("ascii"))
    assert (again["prompt"], again["text"]) == ("漢é1", expected["text"])
    turn = _run("chat", "--model", wide, "--max-tokens", 2, "--json", encoding="ascii",
                input=b"a\n")  # fmt: skip
    assert "漢é" in json.loads(turn.stdout)["text"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_arguments_that_are_no_text_are_reported_in_one_line(wide, tmp_path, encoding):
    for words in (("--prompt", "a\udcff"), ("--model", f"{tmp_path}/\udcff漢", "a")):
        done = _run("generate", *words, encoding=encoding)
        assert done.returncode == 1
        assert done.stdout == b""
        assert done.stderr.count(b"\n") == 1
        assert done.stderr.startswith(b"nomatmul: error: ")


def test_the_path_of_a_model_may_be_any_bytes(wide, tmp_path):
    link = tmp_path / "m\udcff"
    link.symlink_to(wide)
    done = _run("generate", "--model", link, "漢é1", "--max-tokens", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 1


@pytest.mark.parametrize(
    "words", ["--help", "generate --help", "doctor --gib 0.01", "recipes", "footprint --json"]
)
def test_a_reader_that_has_gone_ends_every_command_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*NOMATMUL, *words.split()], stdout=writer, stderr=subprocess.PIPE, timeout=100, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_error_for_a_reader_that_has_gone_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*NOMATMUL, "dance"], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 1


# -- models that are not packed -------------------------------------------------------------------


def test_every_command_says_how_to_pack_a_model_that_is_not(run, training, tmp_path):
    words = tmp_path / "my run"
    (words / "model").mkdir(parents=True)
    for file in training.iterdir():
        (words / "model" / file.name).write_bytes(file.read_bytes())
    encoder = tmp_path / "encoder"
    write_encoder(encoder, encoder_config())
    for source, shown in ((training, str(training)), (words, f"'{words}'"), (encoder, encoder)):
        target = str(shown).replace(str(source), f"{source}-packed")
        expected = f"{source} is not packed: `nomatmul pack {shown} {target}` packs it\n"
        for command in (
            ("generate", "--model", source, "w1"),
            ("chat", "--model", source),
            ("footprint", "--model", source),
            ("bench", "--size", source, "--gib", "0.01"),
            ("embed", "--model", source, "--text", "w1"),
            ("classify", "--model", source, "--text", "w1"),
            ("fill-mask", "--model", source, "--text", "w1"),
        ):
            done = run(*command)
            assert (done.status, done.out) == (1, "")
            assert done.err.endswith(expected), command


def test_several_tasks_are_told_apart(run, training, tmp_path):
    for task in ("left", "right"):
        (tmp_path / task / "model").mkdir(parents=True)
        (tmp_path / task / "model" / "config.json").write_text("{}")
    assert "several tasks (left, right)" in run("generate", "--model", tmp_path, "w1").err


# -- small words ----------------------------------------------------------------------------------


def test_a_prompt_stands_alone_or_behind_its_flag(run, packed):
    options = ("--model", packed, "--temperature", "0", "--max-tokens", "4")
    alone = run("generate", "w1 w2", *options)
    assert alone.status == 0
    assert alone == run("generate", "--prompt", "w1 w2", *options)
    assert "given twice" in run("generate", "w1", "--prompt", "w2", *options).err
    assert "there is no prompt; try nomatmul generate" in run("generate", *options).err


def test_defaults_that_are_lists_are_shown_as_they_are_typed(run):
    assert "(default 1,16)" in run("bench", "--help").out


def test_one_sequence_has_one_speed(run, packed):
    words = ("bench", "--size", packed, "--steps", "2", "--gib", "0.02", "--batch", "1,3")
    out = run(*words).out
    assert "decode of one sequence" in out
    assert "3 sequences together" in out
    assert "1 sequences" not in out
    assert batch_rates(None, (1,), 7.5) == {1: 7.5}


def test_doctor_does_not_compare_scalar_with_itself(run):
    lines = run("doctor", "--gib", "0.01").out.splitlines()
    scalar = next(line for line in lines if line.startswith("self-test: scalar"))
    assert "equal scalar's" not in scalar
    assert "operations" in scalar


@pytest.mark.parametrize("width", [5, 8, 20])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_words_are_not_broken_at_the_edge(width, step):
    text = "an otter  swam\nunder the birch, 漢字漢字漢字 extraordinarily"
    out: list[str] = []
    wrap = WordWrap(out.append, width)
    for at in range(0, len(text), step):
        wrap.push(text[at : at + step])
    wrap.finish()
    shown = "".join(out)
    assert "".join(shown.split()) == "".join(text.split())
    for line in shown.split("\n"):
        columns = len(line) + sum(c in "漢字" for c in line)
        assert columns <= width or len(line.split()) == 1
    words = [w for w in text.split() if w.isascii()]
    assert set(words) <= set(shown.split())
