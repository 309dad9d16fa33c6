"""Mistakes are found before any work, and named in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train_jobs import train_here

from nomatmul.train import TrainConfig


def refused(config: TrainConfig, text: Path, out: Path, message: str, **options: Any) -> None:
    with pytest.raises((ValueError, OSError), match=message) as info:
        train_here(config, text, out, **options)
    assert "\n" not in str(info.value)


def test_missing_and_empty_data(tmp_path: Path, text_file: Path, config: TrainConfig) -> None:
    out = tmp_path / "run"
    refused(config, tmp_path / "absent.txt", out, "absent.txt")
    (tmp_path / "empty.txt").write_text("")
    refused(config, tmp_path / "empty.txt", out, "empty.txt is empty")
    refused(config, text_file, out, "absent.txt", valid=[str(tmp_path / "absent.txt")])
    refused(config, text_file, out, "absent.json", tokenizer=str(tmp_path / "absent.json"))
    assert not out.exists()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    refused(config, tmp_path / "blank.jsonl", out, "no text in .*blank.jsonl")


def test_data_shorter_than_a_sequence(tmp_path: Path, config: TrainConfig) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a short text")
    refused(
        config,
        path,
        tmp_path / "run",
        "the text is too short: it has .* needs at least 49, about .* bytes",
    )
    assert not (tmp_path / "run/run.json").exists()


def test_a_tokenizer_larger_than_the_model(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=270))
    tokenizer = str(finished / "model/tokenizer.json")
    message = r"has 3\d\d entries, model.vocab_size is 270: add --set model.vocab_size=3\d\d"
    refused(small, text_file, tmp_path / "run", message, tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_token(
    tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(path))
    refused(config, text_file, tmp_path / "run", "has no end token", tokenizer=str(path))


def test_another_config_in_the_same_directory(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    out = tmp_path / "run"
    refused(config, text_file, out, r"another config: steps: 1 -> 12 \(--override-config")
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    for override in (False, True):
        refused(wide, text_file, out, "model.num_layers: 2 -> 3$", override_config=override)
    refused(config, text_file, out, "choose another directory", resume="never")
    refused(config, text_file, out, "resume 'maybe'", resume="maybe")
    result = train_here(dataclasses.replace(config, steps=2), text_file, out, override_config=True)
    assert result.step == 2


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and time of change of every file."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(file.relative_to(directory)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in files
    }


def test_changed_data_is_noticed_before_anything_is_written(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    out, other = tmp_path / "run", tmp_path / "other.txt"
    shutil.copytree(finished, out)
    other.write_text(text_file.read_text().replace("bridge", "ridges"))
    tokenizer = str(out / "tokens/tokenizer.json")
    one = dataclasses.replace(config, steps=1)
    before = snapshot(out)
    message = "the data or the tokenizer of the run in .* have changed"
    for data, options in (
        (other, {}),
        (other, {"tokenizer": tokenizer}),
        (text_file, {"valid": [str(text_file)]}),
        (text_file, {"document_start": "^the"}),
    ):
        refused(one, data, out, message, **options)
        assert snapshot(out) == before
    assert train_here(one, text_file, out, tokenizer=tokenizer).step == 1  # the same tokenizer
    moved = tmp_path / "moved.txt"
    shutil.copy(text_file, moved)
    assert train_here(one, moved, out).step == 1  # the same text
    again = train_here(dataclasses.replace(one, steps=2), other, out, override_config=True)
    assert again.step == 2


def test_another_tokenizer_is_noticed_before_anything_is_written(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    """A run with a given tokenizer is not continued with one that would be trained."""
    out = tmp_path / "run"
    one = dataclasses.replace(config, steps=1)
    train_here(one, text_file, out, tokenizer=str(finished / "model/tokenizer.json"))
    before = snapshot(out)
    refused(one, text_file, out, "the data or the tokenizer of the run in .* have changed")
    assert snapshot(out) == before


def test_foreign_directories_and_devices(
    tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    from nomatmul.train import run

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("x")
    refused(config, text_file, tmp_path / "photos", "holds 'cat.jpg' and is no training run")
    refused(config, text_file, text_file, "is not a directory")
    with pytest.raises(ValueError, match="device 'warp' cannot be used"):
        run(config, [str(text_file)], tmp_path / "run", device="warp")


def test_a_damaged_run_file(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run/run.json"
    facts = json.loads(file.read_text())
    for broken in ("{", "[]", json.dumps(facts | {"config": {"recipe": "x"}})):
        file.write_text(broken)
        refused(config, text_file, tmp_path / "run", "run.json is damaged")


def test_token_directories_are_data(
    tmp_path: Path, text_file: Path, finished: Path, config: TrainConfig
) -> None:
    from train_jobs import losses

    one = dataclasses.replace(config, steps=1)
    train_here(one, finished / "tokens/train", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished)
    from nomatmul.train import run

    mixed = [str(finished / "tokens/train"), str(text_file)]
    with pytest.raises(ValueError, match="give one kind"):
        run(one, mixed, tmp_path / "mixed", device="cpu")


def test_a_graph_needs_a_gpu(tmp_path: Path, text_file: Path, config: TrainConfig) -> None:
    graphed = dataclasses.replace(config, compile="graph")
    out = tmp_path / "run"
    refused(graphed, text_file, out, "needs one GPU and one process")
    assert not out.exists()
