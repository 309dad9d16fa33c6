"""A run that was stopped or killed continues with the same losses, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_jobs import (
    SIGKILL_STATUS,
    held_out,
    losses,
    signal_when,
    start,
    steps_on_disk,
    tiny_config,
    train_here,
)

from nomatmul.train import TrainConfig
from nomatmul.train.checkpoints import CheckpointError
from nomatmul.train.loop import Loop


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """An uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train_here(tiny_config(), text_file, out)
    return out


def same_model(a: Path, b: Path) -> bool:
    left, right = load_file(a / "model/model.safetensors"), load_file(b / "model/model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_the_reference_learns(reference: Path, config: TrainConfig) -> None:
    column = losses(reference)
    assert len(column) == config.steps
    assert column[-1] < column[0] - 0.3


def test_two_runs_are_equal(
    reference: Path, tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    train_here(config, text_file, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(reference)
    assert held_out(tmp_path / "run") == held_out(reference)
    assert same_model(tmp_path / "run", reference)


def test_reports_and_checkpoints_do_not_change_a_run(
    reference: Path, tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    other = dataclasses.replace(
        config, log_interval=5, eval_interval=1, sample_interval=2, sample_tokens=3,
        diagnostics_interval=1, checkpoint_interval=1,
    )  # fmt: skip
    train_here(other, text_file, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(reference)
    assert same_model(tmp_path / "run", reference)


def test_killed_at_random_moments(
    reference: Path, tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    out = tmp_path / "run"
    choose = random.Random(1)
    kills = 0
    for _ in range(3):
        wanted = steps_on_disk(out) + choose.randint(1, 5)
        status = signal_when(
            start(config, text_file, out),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        assert status in (0, SIGKILL_STATUS)
        kills += status == SIGKILL_STATUS
    assert kills
    result = train_here(config, text_file, out)
    assert result.status == "finished"
    assert losses(out) == losses(reference)
    assert held_out(out) == held_out(reference)
    assert same_model(out, reference)


@pytest.mark.slow
def test_killed_very_often(tmp_path: Path, text_file: Path, config: TrainConfig) -> None:
    """Kills after random times: in the data, the first step, a checkpoint, the export."""
    config = dataclasses.replace(config, steps=60, checkpoint_interval=2, log_interval=1)
    train_here(config, text_file, tmp_path / "whole")
    choose = random.Random(2)
    out = tmp_path / "run"
    for _ in range(60):
        process = start(config, text_file, out)
        process.join(choose.uniform(0.05, 3.0))
        if process.is_alive():
            process.kill()
        process.join()
    train_here(config, text_file, out)
    assert losses(out) == losses(tmp_path / "whole")
    assert same_model(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, "stopped"), (signal.SIGINT, "interrupted")]
)
def test_signals_save_and_leave(
    reference: Path,
    tmp_path: Path,
    text_file: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: str,
) -> None:
    step = Loop.take_step

    def signalled(self: Loop, *arguments: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "take_step", signalled)
    out = tmp_path / "run"
    before = signal.getsignal(number)
    result = train_here(dataclasses.replace(config, checkpoint_interval=0), text_file, out)
    assert signal.getsignal(number) is before
    assert (result.status, result.step, result.model) == (status, 5, None)
    assert (out / "checkpoints/latest").read_text() == "step-00000005"
    assert len(losses(out)) == 5
    monkeypatch.undo()
    train_here(config, text_file, out)
    assert losses(out) == losses(reference)


def test_a_signal_before_training_leaves_what_can_be_continued(
    tmp_path: Path, text_file: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("nomatmul.train.chunks._encode_chunk", encode)
    result = train_here(config, text_file, tmp_path / "run")
    assert (result.status, result.step) == ("stopped", 0)
    monkeypatch.undo()
    assert train_here(config, text_file, tmp_path / "run").status == "finished"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    reference: Path,
    tmp_path: Path,
    text_file: Path,
    config: TrainConfig,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "checkpoints/step-00000012")
    (out / "checkpoints/latest").write_text("step-00000011")
    shutil.copytree(out / "checkpoints/step-00000009", out / "checkpoints/step-00000011")
    newest = out / "checkpoints/step-00000011/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    train_here(config, text_file, out)
    assert "step-00000011 is damaged (model.safetensors does not match" in capsys.readouterr().err
    assert losses(out) == losses(reference)


def test_when_all_checkpoints_are_damaged_nothing_is_lost(
    reference: Path, tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    for manifest in out.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"every checkpoint under .* is damaged"):
        train_here(config, text_file, out)
    assert len(list(out.glob("checkpoints/step-*"))) == 2


def test_a_finished_run_stays_finished(
    reference: Path, tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    result = train_here(config, text_file, reference)
    assert (result.status, result.step) == ("finished", 12)
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_only_the_last_checkpoints_are_kept(reference: Path) -> None:
    names = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert names == ["latest", "step-00000009", "step-00000012"]
