"""The commands on a small model: what they print, and that they agree with the library."""

from __future__ import annotations

import io
import json
import shutil
import sys

import numpy as np
import pytest

import nomatmul
from nomatmul.cli import doctor
from nomatmul.engine import loading


def test_generate_streams_what_the_library_makes(run, packed):
    options = ("--temperature", "0.9", "--seed", "4", "--max-tokens", "12", "--top-p", "1")
    done = run("generate", "--model", packed, "--prompt", "w1 w2", *options)
    expected = nomatmul.load(packed).generate(
        "w1 w2", max_tokens=12, temperature=0.9, seed=4, top_p=1.0
    )
    assert (done.status, done.err) == (0, "")
    assert done.out == expected + "\n"


def test_generate_json(run, packed):
    done = run("generate", "--model", packed, "--prompt", "w1 w2", "--seed", "4", "--json",
               "--max-tokens", "5")  # fmt: skip
    report = json.loads(done.out)
    assert report["tokens"] == 5
    assert report["prompt_tokens"] == 2
    assert report["finish_reason"] == "length"
    assert report["seconds_to_first_token"] > 0
    assert report["tokens_per_second"] > 0


def test_generate_reads_standard_input_and_echoes(run, packed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
    options = ("--temperature", "0", "--max-tokens", "3")
    piped = run("generate", "--model", packed, "--prompt", "-", *options, "--echo")
    plain = run("generate", "--model", packed, "--prompt", "w1 w2", *options)
    assert piped.out == "w1 w2" + plain.out


def test_generate_stops_before_a_stop_text(run, packed):
    options = ("--temperature", "0", "--max-tokens", "20")
    text = run("generate", "--model", packed, "--prompt", "w1", *options).out
    word = text.split()[3]
    cut = run("generate", "--model", packed, "--prompt", "w1", *options, "--stop", word).out
    assert cut.strip() == text[: text.index(word)].strip()


def test_no_tokens_are_no_text(run, packed):
    done = run("generate", "--model", packed, "--prompt", "w1", "--max-tokens", "0", "--json")
    report = json.loads(done.out)
    assert (report["text"], report["tokens"]) == ("", 0)
    assert report["seconds_to_first_token"] is None


def _chat(run, monkeypatch, packed, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return run("chat", "--model", packed, "--max-tokens", "6", "--seed", "1", *options)


def test_chat_keeps_resets_saves_and_loads_its_state(run, monkeypatch, packed, tmp_path):
    state = tmp_path / "a b.state"
    lines = ["w1 w2", f"/save {state}", "w3", f"/load {state}", "w3", "/reset", "w3", "/quit", "w4"]
    done = _chat(run, monkeypatch, packed, lines, "--temperature", "0")
    first, second, again, fresh = done.out.splitlines()
    assert done.status == 0
    assert second == again
    assert fresh != second
    assert "saved 8 tokens" in done.err
    assert first


def test_chat_as_json_gives_one_object_a_turn(run, monkeypatch, packed):
    done = _chat(run, monkeypatch, packed, ["w1 w2", "/reset", "w3"], "--json")
    first, second = (json.loads(line) for line in done.out.splitlines())
    assert (first["prompt"], first["tokens"], first["finish_reason"]) == ("w1 w2", 6, "length")
    assert (first["context"], second["context"]) == (8, 7)
    plain = _chat(run, monkeypatch, packed, ["w1 w2"])
    assert plain.out == first["text"] + "\n"


def test_chat_survives_mistakes(run, monkeypatch, packed):
    done = _chat(run, monkeypatch, packed, ["/load nowhere", "/dance", "/save", "", "w1"])
    lines = done.err.splitlines()
    assert done.status == 1  # told to a script at its end
    assert [line.startswith("nomatmul: error: ") for line in lines] == [True] * 3
    assert len(done.out.splitlines()) == 1


@pytest.mark.train
def test_eval_gives_the_same_in_the_engine_and_in_torch(run, training, packed, text):
    ours = json.loads(run("eval", "--model", packed, "--text", text, "--json").out)
    theirs = json.loads(run("eval", "--model", training, "--text", text, "--json").out)
    assert ours["tokens"] == theirs["tokens"] == 59
    assert ours["bytes"] == theirs["bytes"]
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    assert ours["perplexity"] == pytest.approx(np.exp(ours["loss"]))


def test_eval_of_the_first_tokens(run, packed, text):
    report = json.loads(
        run("eval", "--model", packed, "--text", text, "--json", "--max-tokens", "10").out
    )
    assert report["tokens"] == 10
    plain = run("eval", "--model", packed, "--text", text, "--max-tokens", "10").out
    assert f"{report['loss']:.4f}" in plain


def test_footprint_adds_up(run, packed):
    report = json.loads(run("footprint", "--model", packed, "--json").out)
    parts = sum(report[part] for part in ("embedding", "core", "head", "norms"))
    assert parts == report["weights"]
    assert report["disk"] == sum(file.stat().st_size for file in packed.iterdir())
    assert 0 < report["resident"] <= report["peak"]
    assert report["state"] == 4 * 2 * 32
    assert "embedding" in run("footprint", "--model", packed).out


def test_doctor_finds_this_machine_well(run):
    done = run("doctor", "--json", "--gib", "0.01")
    report = json.loads(done.out)
    assert done.status == 0, report
    assert report["ok"]
    assert all(test["ok"] for test in report["self_test"])
    assert set(report["extras"]) == {
        *("train", "chat", "hub", "serve", "serve-ray", "eval", "bench", "hardware")
    }
    assert report["versions"]["nomatmul"] == nomatmul.__version__
    assert "all is well" in run("doctor", "--gib", "0.01").out


def test_doctor_runs_the_models_in_the_box(run, monkeypatch, tmp_path):
    report = json.loads(run("doctor", "--json", "--gib", "0.01").out)
    assert report["box"]["present"]
    assert report["box_encoder"]["text"] in run("doctor", "--gib", "0.01").out
    shutil.copytree(loading.ENCODER_BOX, tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(loading, "ENCODER_BOX", tmp_path / "damaged")
    done = run("doctor", "--json", "--gib", "0.01")
    assert (done.status, json.loads(done.out)["box_encoder"]["ok"]) == (1, False)
    monkeypatch.setattr(loading, "ENCODER_BOX", tmp_path / "none")
    done = run("doctor", "--gib", "0.01")  # built without it: no fault
    assert done.status == 0
    assert "encoder in the box" in done.out


def test_doctor_reports_a_wrong_kernel(run, monkeypatch):
    wrong = [{"isa": "avx2", "operation": "add", "ok": False}]
    monkeypatch.setattr(doctor, "_self_test", lambda: wrong)
    done = run("doctor", "--gib", "0.01")
    assert done.status == 1
    assert "SOMETHING IS WRONG" in done.out


def test_bench_measures_a_packed_model(run, packed):
    done = run("bench", "--size", packed, "--threads", "1,2", "--prefill", "8", "--steps", "2",
               "--batch", "1,3", "--gib", "0.02", "--json")  # fmt: skip
    results = json.loads(done.out)["results"]
    assert [result["threads"] for result in results] == [1, 2]
    for result in results:
        assert set(result["batch_tokens_per_second"]) == {"1", "3"}
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second",
                    "peak_resident_bytes", "read_bandwidth_bytes_per_second",
                    "fraction_of_bandwidth_limit"):  # fmt: skip
            assert result[key] > 0


def test_sizes_of_bench_are_those_of_the_recipes():
    from nomatmul.evaluate.speed import SIZES
    from nomatmul.train.recipes import RECIPES

    for size, name in (("370M", "mmfree_370m"), ("1.3B", "mmfree_1_3b"), ("2.7B", "mmfree_2_7b")):
        config = RECIPES[name]().model.to_dict()
        assert {key: config[key] for key in SIZES[size]} == SIZES[size]


def test_train_takes_the_arguments_of_the_training_room(monkeypatch, run):
    import dataclasses

    import nomatmul.train
    from nomatmul.cli import train

    names = {field.name for field in dataclasses.fields(train.Options)}
    assert names == {field.name for field in dataclasses.fields(nomatmul.train.TrainArgs)}
    seen = []
    monkeypatch.setattr(nomatmul.train, "main", lambda args: seen.append(args) or 0)
    done = run("train", "box", "--data", "a", "b", "--out", "o", "--set", "x=1", "--set", "y=2",
               "--time-limit", "60")  # fmt: skip
    assert done.status == 0
    assert seen == [
        nomatmul.train.TrainArgs(
            recipe="box", data=("a", "b"), out="o", set=("x=1", "y=2"), time_limit=60.0
        )
    ]
