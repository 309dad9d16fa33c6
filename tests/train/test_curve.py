"""How a run ends for whom started it: its picture, its scores, the next command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nomatmul import cli
from nomatmul.train.curve import draw_curve, training_curve
from nomatmul.train.metrics import Console


def test_the_curve_is_of_means_over_equal_parts() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    curve = training_curve([*rows, {"step": 500, "valid_loss": 9.0}])
    assert len(curve) == 200
    assert curve[:2] == [(5, 3.0), (10, 8.0)]
    assert curve[-1][0] == 1000
    assert training_curve([{"step": 3, "loss": 2.0}]) == [(3, 2.0)]
    assert training_curve([]) == []


def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert draw_curve(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def train(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def train(recipe: str, *more: str) -> tuple[str, str]:
        small = ["model.hidden_size=32", "model.num_layers=1", "model.vocab_size=300"]
        sets = [word for value in [*small, "warmup_steps=0"] for word in ("--set", value)]
        words = ["train", recipe, "--data", str(text_file), "--out", str(tmp_path / "run")]
        assert cli.main([*words, "--steps", "4", "--device", "cpu", *sets, *more]) == 0
        return capsys.readouterr()

    return train


def test_the_end_says_time_score_and_the_next_command(train, tmp_path: Path) -> None:
    out, err = train("cpu_minute")
    lines = out.splitlines()
    assert lines[0] == f"trained 4 steps; the model is in {tmp_path / 'run/model'}"
    row = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    score = [r["valid_bits_per_byte"] for r in row if "valid_bits_per_byte" in r][-1]
    curve = tmp_path / "run/curve.png"
    assert lines[1].startswith("0:00:")
    assert lines[1].endswith(f"; {score:.4f} bits per byte held out; its curve is {curve}")
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert lines[2] == f"next: nomatmul pack {tmp_path / 'run'} packed/run"
    assert "training a tokenizer ...\n" in err
    assert "tokenizer: 0" not in err


def test_quiet_and_json_print_nothing_else(train) -> None:
    out, err = train("cpu_minute", "--json", "--set", "sample_interval=2")
    assert json.loads(out)["curve"].endswith("curve.png")
    assert err == ""
    out, err = train("cpu_minute", "--quiet", "--set", "sample_interval=2")
    assert (len(out.splitlines()), err) == (1, "")


def test_an_encoder_is_to_be_fine_tuned(train, tmp_path: Path) -> None:
    out, _ = train("bert_cpu_minute", "--set", "model.num_heads=2")
    assert "nats a hidden token; its curve" in out
    assert f"next: nomatmul finetune {tmp_path / 'run'} --task FILE.tsv" in out


def test_a_beginning_is_reported_at_once(capsys: pytest.CaptureFixture) -> None:
    console = Console()
    console.preparing("tokens", 5000, 0)
    console.preparing("training a tokenizer", 0, 0)
    console.preparing("tokens", 9000, 10_000)  # too soon
    assert capsys.readouterr().err == "tokens: 5,000\ntraining a tokenizer ...\n"
