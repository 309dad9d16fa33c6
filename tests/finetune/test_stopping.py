"""A fine-tuning that is stopped inside a seed goes on there, with the same results."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nomatmul import cli
from nomatmul.finetune import checkpoint as room
from nomatmul.finetune import run as running
from nomatmul.models import EncoderForSequenceClassification, MaskedLM
from nomatmul.models.hf.config import EncoderConfig
from nomatmul.train.tokenizer import word_piece

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["kelp", "sand", "gull", "foam", "reef", "tide"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that the random state counts."""
    out = tmp_path_factory.mktemp("runs") / "encoder"
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=16,
        intermediate_size=24, pooler_size=16, hidden_dropout=0.2, classifier_dropout=0.2,
    )  # fmt: skip
    MaskedLM(config).save_pretrained(out / "model")
    tokenizer = word_piece({word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    tokenizer.save(str(out / "model/tokenizer.json"))
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choose = random.Random(4)
    lines = ["sentence\tlabel"]
    for _ in range(80):
        words = choose.choices(WORDS, k=5)
        lines.append(f"{' '.join(words)}\t{'wet' if words.count('tide') else 'dry'}")
    train = tmp_path_factory.mktemp("rows") / "shore.tsv"
    train.write_text("\n".join(lines) + "\n")
    train.with_name("dev.tsv").write_text("\n".join(lines[:30]) + "\n")
    return train


@pytest.fixture(scope="module")
def command(encoder: Path, rows: Path) -> Any:
    def command(out: Path, *more: str) -> int:
        words = [
            "finetune",
            str(encoder),
            "--task",
            str(rows),
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        words += ["--valid", str(rows.with_name("dev.tsv")), "--batch-size", "8", "--seeds", "2"]
        return cli.main([*words, "--epochs", "3", "--learning-rate", "0.003", *more])

    return command


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int) -> None:
    """The process signals itself in that step, counted over all seeds."""
    real, seen = room.SeedCheckpoint.after_step, [0]

    def after_step(self: Any, *arguments: Any) -> None:
        seen[0] += 1
        if seen[0] == steps:
            os.kill(os.getpid(), number)
        real(self, *arguments)

    monkeypatch.setattr(room.SeedCheckpoint, "after_step", after_step)


def results(out: Path) -> list[Any]:
    found = []
    for seed in (0, 1):
        values = json.loads((out / f"shore/seed-{seed}.json").read_text())
        values.pop("seconds")
        found.append(values)
    return [*found, load_file(out / "shore/model/model.safetensors")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Path:
    """The results of one start."""
    out = tmp_path_factory.mktemp("whole")
    assert command(out, "--quiet") == 0
    return out


def test_stopped_seeds_give_the_results_of_one_start(
    command: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command(whole, "--quiet") == 0  # from its files
    table = capsys.readouterr().out
    for steps, number, status, word in (
        (7, signal.SIGINT, 130, "interrupted"),  # in the first epoch of the first seed
        (3, signal.SIGTERM, 0, "stopped"),  # at the end of it
        (32, signal.SIGINT, 130, "interrupted"),  # in the second seed
    ):
        with monkeypatch.context() as patch:
            stop_after(patch, steps, number)
            assert command(tmp_path, "--quiet") == status
        hint = f"{word} in shore, saved in {tmp_path}; the same command goes on there\n"
        assert capsys.readouterr() == ("", hint)
        assert len(list(tmp_path.glob("shore/seed-*-checkpoint"))) == 1
    assert (tmp_path / "shore/seed-0.json").is_file()
    assert command(tmp_path, "--quiet") == 0
    assert capsys.readouterr().out == table
    (a0, a1, a), (b0, b1, b) = results(whole), results(tmp_path)
    assert (a0, a1) == (b0, b1)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.glob("shore/seed-*-checkpoint"))


def test_a_killed_seed_goes_on_from_its_last_checkpoint(
    command: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGKILL leaves it: nothing is saved behind the last checkpoint."""
    real = room.SeedCheckpoint.after_step
    seen = [0]

    def killed(self: Any, *arguments: Any) -> None:
        seen[0] += 1
        real(self, *arguments)
        if seen[0] == 14:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(room, "_EVERY", 0.0)
        patch.setattr(room.SeedCheckpoint, "after_step", killed)
        assert command(tmp_path, "--quiet") == 1
    assert (
        json.loads((tmp_path / "shore/seed-0-checkpoint/position.json").read_text())["batch"] == 4
    )
    assert command(tmp_path, "--quiet") == 0
    assert results(tmp_path)[:2] == results(whole)[:2]


def test_a_checkpoint_of_other_settings_or_damaged_is_refused(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        assert command(tmp_path, "--json") == 130
    assert json.loads(capsys.readouterr().out) == {"status": "interrupted", "tasks": []}
    assert command(tmp_path, "--weight-decay", "0.1", "--quiet") == 1
    assert "position.json was made with another weight_decay (0.0, now 0.1)" in (
        capsys.readouterr().err
    )
    assert command(tmp_path, "--group-lengths", "--quiet") == 1
    assert "another group_lengths (None, now True)" in capsys.readouterr().err
    (tmp_path / "shore/seed-0-checkpoint/optimizer.safetensors").unlink()
    assert command(tmp_path, "--quiet") == 1
    assert "remove it to train this seed from its start" in capsys.readouterr().err


def test_the_time_left_is_that_of_all_seeds(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    shown = []
    monkeypatch.setattr(running.time, "monotonic", clock)
    monkeypatch.setattr(
        running.Console, "progress", lambda self, share, text: shown.append((share, text))
    )
    assert command(tmp_path) == 0
    shares = [share for share, _ in shown]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert shares[len(shares) // 2 - 1] == pytest.approx(0.5)
    lefts = [text for _, text in shown if "left for 2 seeds" in text]
    assert lefts
    assert "shore seed 0" in lefts[0]
    assert "left for 1 seeds" not in shown[0][1]


def test_a_model_that_memory_cannot_hold_is_refused(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: 1 << 27)
    assert command(tmp_path) == 1
    said = capsys.readouterr().err
    assert "too little memory: about 0.3 GiB" in said
    assert "0.1 GiB are free; a smaller --batch-size" in said
    assert not list(tmp_path.iterdir())
    assert command(tmp_path, "--force", "--quiet") == 0


def test_from_fine_tuning_to_classes(
    command: Any, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    """`pack` takes the fine-tuning's directory; the packed model classifies."""
    packed = tmp_path / "packed"
    assert cli.main(["pack", str(whole), str(packed), "--no-check"]) == 0
    capsys.readouterr()
    texts = ["tide tide reef", "gull sand foam kelp"]
    words = ["classify", "--model", str(packed), "--json"]
    assert cli.main([*words, *(word for text in texts for word in ("--text", text))]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    model = EncoderForSequenceClassification.from_pretrained(whole / "shore/model").eval()
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([model.tokenizer.encode(text).ids])).logits[0]
        scores = logits.softmax(-1)
        assert answer["label"] == model.config.id2label[int(scores.argmax())]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-4)
