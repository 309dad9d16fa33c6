"""embed, fill-mask, classify on small encoders, and what pack and footprint say about them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from encoder_files import TREES, encoder_config, write_encoder, write_word_piece

LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """{task: packed directory}; the source of the masked one lies beside it."""
    from nomatmul import cli

    root, made = tmp_path_factory.mktemp("encoders"), {}
    for task in ("masked", "sequence", "token"):
        source = root / f"{task}-source"
        labels = LABELS if task != "masked" else ()
        write_encoder(source, encoder_config(**TREES), task, labels)
        write_word_piece(source)
        made[task] = root / task
        assert cli.main(["pack", str(source), str(made[task]), "--no-check", "--json"]) == 0
    return made


def test_embed_prints_json(run, encoders):
    done = run(
        *("embed", "--model", encoders["masked"], "--text", "the river", "--text", "a town"),
        *("--pooling", "first", "--normalize", "--json"),
    )
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert (report["texts"], report["dimension"], report["pooling"]) == (2, 24, "first")
    np.testing.assert_allclose(np.linalg.norm(report["embeddings"], axis=1), 1, rtol=1e-5)


def test_embed_reads_standard_input_and_writes_numpy(run, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the river\n\na town\n"))
    out = tmp_path / "vectors.npy"
    done = run("embed", "--model", encoders["masked"], "--file", "-", "--out", out)
    assert done.status == 0, done.err
    assert done.out == f"wrote 2 vectors of 24 numbers to {out}\n"
    file = tmp_path / "texts.txt"
    file.write_text("the river\na town\n")
    done = run("embed", "--model", encoders["masked"], "--file", file)
    printed = np.array([line.split() for line in done.out.splitlines()], np.float32)
    np.testing.assert_allclose(printed, np.load(out), atol=1e-4)


def test_fill_mask(run, encoders, monkeypatch):
    done = run(
        *("fill-mask", "--model", encoders["masked"], "--top-k", 2),
        *("--text", "the [MASK] and the [MASK]", "--json"),
    )
    assert done.status == 0, done.err
    masks = json.loads(done.out)["masks"]
    assert [len(fillings) for fillings in masks] == [2, 2]
    monkeypatch.setattr("sys.stdin", io.StringIO("the [MASK]\n"))
    done = run("fill-mask", "--model", encoders["masked"], "--text", "-")
    assert len(done.out.splitlines()) == 5


def test_classify(run, encoders):
    model = encoders["sequence"]
    done = run("classify", "--model", model, "--text", "the river", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["labels"] == list(LABELS)
    answer = report["answers"][0]
    assert answer["input"] == "the river"
    assert answer["label"] in LABELS
    done = run("classify", "--model", model, "--text", "the river\ta town", "--pairs")
    label, score, text = done.out.rstrip("\n").split("\t", 2)
    assert label in LABELS
    assert 0 < float(score) <= 1
    assert text == "the river\ta town"
    done = run("classify", "--model", encoders["token"], "--text", "the river")
    assert [line.split()[0] for line in done.out.split("\n") if line] == ["the", "river"]


def test_pack_says_what_rounding_costs(run, encoders, tmp_path):
    source = encoders["masked"].with_name("masked-source")
    done = run("pack", source, tmp_path / "small", "--rows", "int8", "--dense", "int8", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert (report["rows"], report["dense"], report["embedding"]) == ("int8", "int8", "f32")
    assert 0 < report["check"]["logit_error"] < 0.2
    done = run("pack", source, tmp_path / "same")
    assert "tokens on the same path 100.00 %" in " ".join(done.out.split())
    footprint = json.loads(run("footprint", "--model", tmp_path / "small", "--json").out)
    plain = json.loads(run("footprint", "--model", tmp_path / "same", "--json").out)
    assert footprint["trees"] < plain["trees"]
    assert footprint["disk"] < plain["disk"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed"], "there is no text; give TEXT, or --file FILE"),
        (["embed", "--file", "/nowhere"], "/nowhere: No such file or directory"),
        (["embed", "--text", "river " * 30], "text 0 has 32 tokens, the model has 20 positions"),
        (["fill-mask", "--text", "the river"], "the text has no [MASK] to fill in"),
        (["classify", "--text", "a"], 'classify needs a model with a head for task "sequence"'),
        (["classify", "--text", "a", "--pairs"], "text 1 must be two texts with one tab between"),
        (["generate", "--prompt", "a"], "is an encoder, which continues no text"),
    ],
)
def test_mistakes_are_one_line(run, encoders, arguments, message):
    done = run(arguments[0], "--model", encoders["masked"], *arguments[1:])
    assert done.status == 1
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_language_model_is_no_encoder(run, packed):
    done = run("fill-mask", "--model", packed, "--text", "a")
    assert done.status == 1
    assert "is a language model, not an encoder; `nomatmul generate` runs it" in done.err


def test_embed_reads_the_last_token_of_a_language_model(run, packed):
    done = run("embed", "--model", packed, "--text", "a", "--text", "a b", "--json")
    report = json.loads(done.out)
    assert (report["pooling"], report["texts"]) == ("last", 2)
    np.testing.assert_allclose(np.linalg.norm(report["embeddings"], axis=1), 1, rtol=1e-5)
    for option in (("--pooling", "mean"), ("--truncate",)):
        done = run("embed", "--model", packed, "--text", "a", *option)
        assert done.status == 1
        assert "for encoders" in done.err


def test_a_ternary_model_has_no_rows(run, training, tmp_path):
    done = run("pack", training, tmp_path / "packed", "--rows", "int8")
    assert done.status == 1
    assert "rows 'int8' is for encoders" in done.err


def test_without_a_model_the_encoder_in_the_box_answers(run, encoders, tmp_path, monkeypatch):
    from nomatmul.engine import loading

    monkeypatch.setattr(loading, "ENCODER_BOX", encoders["masked"])
    for words in (("fill-mask", "--text", "the [MASK]"), ("embed", "--text", "the river")):
        done = run(*words, "--threads", 1, "--json")
        assert done.status == 0, done.err
        assert json.loads(done.out)["model"] == str(encoders["masked"])
    monkeypatch.setattr(loading, "ENCODER_BOX", tmp_path / "none")
    for words in (("fill-mask", "--text", "the [MASK]"), ("embed", "--text", "the river")):
        done = run(*words)
        assert done.status == 1
        assert "this installation carries no encoder; give the path" in done.err


def test_a_packed_encoder_learns_a_task_and_is_packed_again(run, encoders, tmp_path, monkeypatch):
    from nomatmul.engine import loading

    monkeypatch.setattr(loading, "ENCODER_BOX", encoders["masked"])
    file, out = tmp_path / "reviews.tsv", tmp_path / "out"
    rows = [("the river", "wet"), ("a quiet old town", "dry")] * 60
    file.write_text("sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    done = run(
        *("finetune", "--task", file, "--out", out, "--seeds", 1, "--epochs", 6),
        *("--learning-rate", "5e-3", "--device", "cpu", "--json"),
    )
    assert done.status == 0, done.err
    assert run("pack", out, tmp_path / "packed", "--no-check").status == 0
    done = run("classify", "--model", tmp_path / "packed", "--text", "the river", "--json")
    assert json.loads(done.out)["answers"][0]["label"] == "wet"
