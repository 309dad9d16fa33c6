"""Runs with a teacher: what they report, exact resumption, two ranks, the command, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from many_jobs import train_any
from safetensors.torch import load_file
from teachers import write_teacher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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

from nomatmul import cli
from nomatmul.train import TrainConfig, recipe
from nomatmul.train.distill import DistillArgs
from nomatmul.train.memory import estimate
from nomatmul.train.metrics import read_metrics
from nomatmul.train.teacher_files import find_teacher

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A Transformer++ that has learnt something of the text."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_config()
    model = dataclasses.replace(config.model, linear="dense", token_mixer="attention")
    train_here(dataclasses.replace(config, model=model, steps=30), text_file, out)
    return out


@pytest.fixture(scope="module")
def taught(teacher: Path) -> TrainConfig:
    """Half of the targets are the teacher's; weights are rounded after a while."""
    model = dataclasses.replace(tiny_config().model, vocab_size=find_teacher(str(teacher)).entries)
    return tiny_config(model=model, teacher_share=0.5, temperature=1.5, full_precision=0.3)


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, teacher: Path, taught: TrainConfig
) -> Path:
    """An uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("student") / "run"
    train_here(taught, text_file, out, teacher=str(teacher))
    return out


def _distances(out: Path) -> list[float]:
    return [row["distill_loss"] for row in read_metrics(out) if "distill_loss" in row]


def _same_model(a: Path, b: Path) -> bool:
    left, right = load_file(a / "model/model.safetensors"), load_file(b / "model/model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_a_student_nears_its_teacher(student: Path, teacher: Path, taught: TrainConfig) -> None:
    distances = _distances(student)
    assert len(distances) == len(losses(student)) == taught.steps
    assert all(value > 0 for value in distances)
    assert distances[-1] < 0.8 * distances[0]
    facts = json.loads((student / "run.json").read_text("utf-8"))
    assert facts["teacher"] == {
        "path": str(teacher),
        "sha256": find_teacher(str(teacher)).sha256,
    }
    own, old = (path / "model/tokenizer.json" for path in (student, teacher))
    assert own.read_bytes() == old.read_bytes()


def test_tensorboard_has_both_losses(student: Path) -> None:
    board = EventAccumulator(str(student / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/distill_loss", "valid/valid_loss"} <= set(board.Tags()["scalars"])


def test_losses_that_are_reported_are_the_texts_own(
    tmp_path: Path, text_file: Path, student: Path, taught: TrainConfig
) -> None:
    """At the first step, before anything differs, they are those of a run without a teacher."""
    tokenizer = student / "model" / "tokenizer.json"
    plain = dataclasses.replace(taught, teacher_share=0.0, temperature=1.0, steps=3)
    train_here(plain, text_file, tmp_path / "plain", tokenizer=str(tokenizer))
    assert losses(student)[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=1e-6)
    assert losses(student)[0] != pytest.approx(_distances(student)[0], rel=1e-2)


def test_killed_and_continued_it_is_the_same_run(
    tmp_path: Path, text_file: Path, teacher: Path, taught: TrainConfig, student: Path
) -> None:
    out, kills = tmp_path / "run", 0
    for wanted in (4, 9):
        status = signal_when(
            start(taught, text_file, out, teacher=str(teacher)),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        assert status in (0, SIGKILL_STATUS)
        kills += status == SIGKILL_STATUS
    assert kills
    result = train_here(taught, text_file, out, teacher=str(teacher))
    assert result.status == "finished"
    assert losses(out) == losses(student)
    assert _distances(out) == _distances(student)
    assert held_out(out) == held_out(student)
    assert _same_model(out, student)


def test_a_run_goes_on_with_its_teacher_only(
    tmp_path: Path, text_file: Path, teacher: Path, taught: TrainConfig, student: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(student, out)
    other = write_teacher(
        "llama", tmp_path / "llama", student / "model" / "tokenizer.json", rows=300
    )

    def refused(message: str, config: TrainConfig = taught, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train_here(config, text_file, out, **options)

    refused("another config: teacher: .*run -> .*llama", teacher=str(other))
    half = dataclasses.replace(taught, teacher_share=0.25)
    refused("teacher_share: 0.5 -> 0.25", half, teacher=str(teacher))
    plain = dataclasses.replace(taught, teacher_share=0.0)
    refused("teacher_share: 0.5 -> 0.0; teacher: .*run -> none", plain)
    warm = dataclasses.replace(taught, temperature=1.0)
    refused("temperature: 1.5 -> 1.0", warm, teacher=str(teacher))


def test_two_ranks_learn_what_one_learns(
    tmp_path: Path, text_file: Path, teacher: Path, taught: TrainConfig
) -> None:
    config = dataclasses.replace(taught, micro_batch_size=1, steps=6)
    for ranks in (1, 2):
        train_any(ranks, config, text_file, tmp_path / str(ranks), teacher=str(teacher))
    one, two = tmp_path / "1", tmp_path / "2"
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert _distances(two) == pytest.approx(_distances(one), rel=2e-4)
    for (_, a), (_, b) in zip(held_out(one), held_out(two), strict=True):
        assert b == pytest.approx(a, rel=2e-4)


def test_the_summary_names_the_teacher(
    tmp_path: Path,
    text_file: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command, whose student gets the teacher's vocabulary by itself."""
    sizes = ["hidden_size=32", "num_layers=2", "intermediate_size=64"]
    sets = [f"model.{size}" for size in sizes] + ["sequence_length=16", "batch_size=2",
            "micro_batch_size=2", "sample_interval=0"]  # fmt: skip
    words = [word for value in sets for word in ("--set", value)]
    status = cli.main(
        ["distill", str(teacher), "cpu_minute", "--data", str(text_file), "--out",
         str(tmp_path / "run"), "--steps", "2", "--share", "1", "--workers", "1", *words]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    count = find_teacher(str(teacher)).size.parameters
    assert f"; teacher {teacher}: {count:,} parameters" in captured.err
    config = json.loads((tmp_path / "run/run.json").read_text("utf-8"))["config"]
    assert config["teacher_share"] == 1.0
    assert config["model"]["vocab_size"] == find_teacher(str(teacher)).entries


def test_memory_counts_the_teacher(teacher: Path) -> None:
    config = dataclasses.replace(recipe("mmfree_370m"), teacher_share=0.5)
    size = dataclasses.replace(
        find_teacher(str(teacher)).size,
        parameters=10**9, rows=32000, hidden=2048, intermediate=5632, wide=False,
    )  # fmt: skip
    plain, more = estimate(config, 2, "none"), estimate(config, 2, "none", teacher=size)
    assert more.teacher == 2 * 10**9  # at each of the two, in bfloat16
    assert more.certain == plain.certain + more.teacher
    assert more.total - plain.total == more.teacher + more.looking
    assert 1 << 27 < more.looking < 1 << 32
    assert "teacher " in more.text()
    assert "teacher " not in plain.text()
    host = estimate(config, 1, "none", fused=False, host=True, teacher=size)
    assert host.teacher == 4 * 10**9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "share 0.0 must be above 0 and at most 1"),
        ({"share": 1.5}, "share 1.5 must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature 0.0 must be from 0.01"),
        ({"recipe": "encoder_cpu_minute"}, "encoder_cpu_minute trains an encoder"),
        ({"recipe": "nothing"}, "nothing"),
        ({"teacher": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_a_command_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, teacher: Path
) -> None:
    values: dict[str, Any] = {"recipe": "cpu_minute", "data": ("x",), "out": "y"}
    with pytest.raises(ValueError, match=message):
        DistillArgs(**(values | {"teacher": str(teacher)} | changes)).config()


def test_what_does_not_fit_is_refused_before_work(
    tmp_path: Path, text_file: Path, teacher: Path, taught: TrainConfig, finished: Path
) -> None:
    short = write_teacher(
        "gpt2", tmp_path / "gpt2", teacher / "model" / "tokenizer.json", rows=300, n_positions=8
    )
    other = tmp_path / "other.json"
    tokenizer = json.loads((teacher / "model/tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"].pop()
    other.write_text(json.dumps(tokenizer), "utf-8")

    def refused(message: str, config: TrainConfig = taught, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train_here(config, text_file, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    refused("teacher_share 0.5 needs a teacher")
    plain = dataclasses.replace(taught, teacher_share=0.0)
    refused("has teacher_share 0: it would teach nothing", plain, teacher=str(teacher))
    refused("sequence_length 16 is above the 8 tokens", teacher=str(short))
    refused(
        r"other\.json is not the tokenizer of teacher", teacher=str(teacher), tokenizer=str(other)
    )
    for size in (taught.model.vocab_size - 1, 400):
        model = dataclasses.replace(taught.model, vocab_size=size)
        refused(
            f"model.vocab_size {size} does not fit teacher",
            dataclasses.replace(taught, model=model),
            teacher=str(teacher),
        )
    dials = {
        "token_mixer": "attention",
        "linear_norm": "none",
        "scale_group": 32,
        "rounding": "even",
    }
    grouped = dataclasses.replace(taught.model, **dials)
    refused(
        "set model.head_linear=dense",
        dataclasses.replace(taught, model=grouped),
        teacher=str(teacher),
    )
