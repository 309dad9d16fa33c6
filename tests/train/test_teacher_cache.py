"""What a teacher says, kept on disk: its loss, resumption, a second run, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from many_jobs import train_any
from teachers import write_teacher
from train_jobs import (
    SIGKILL_STATUS,
    losses,
    signal_when,
    start,
    steps_on_disk,
    tiny_config,
    train_here,
)

from nomatmul.formats.files.lock import locked
from nomatmul.ops.loss import mixed_cross_entropy
from nomatmul.train import TrainConfig, teacher_cache
from nomatmul.train.batches import Batches, Slice, WindowOrder
from nomatmul.train.metrics import read_metrics
from nomatmul.train.plan import DevicePlan
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_cache import CachedTeacher, record_of
from nomatmul.train.tokens import open_stream

from nomatmul.train.distill import DistillArgs  # isort: skip

pytestmark = pytest.mark.train
CPU = DevicePlan(torch.device("cpu"))
TOP = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    return write_teacher("llama", directory, finished / "model" / "tokenizer.json", rows=300)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Two epochs and a half of the text below."""
    return tiny_config(teacher_share=0.5, temperature=1.5, teacher_top=TOP, steps=20)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Some 34 windows of 16 tokens."""
    file = tmp_path_factory.mktemp("short") / "text.txt"
    file.write_text(text_file.read_text("utf-8")[:1500], "utf-8")
    return file


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path, config: TrainConfig
) -> Path:
    """An uninterrupted run; its cache is beside it."""
    out = tmp_path_factory.mktemp("student") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "_PART", 8 * 16 * record_of(300, TOP).itemsize)
        train_here(config, text, out, teacher=str(teacher), cache=str(out.parent / "cache"))
    return out


def _distances(out: Path) -> list[float]:
    return [row["distill_loss"] for row in read_metrics(out) if "distill_loss" in row]


def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_PART", 8 * 16 * record_of(300, TOP).itemsize)


def _said(log_p_NK: torch.Tensor, ids_NK: torch.Tensor, rest_N: torch.Tensor, t: float) -> Any:
    """A CachedTeacher that has just looked at these."""
    said = object.__new__(CachedTeacher)
    said._temperature, said._kept = t, (ids_NK, log_p_NK, rest_N)
    said._source = teacher_cache.TeacherLogits(said.logits)
    return said


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_the_kept_tokens_and_one_class_more(temperature: float) -> None:
    """Value and gradient against autograd of the formula in the docstring."""
    torch.manual_seed(0)
    x, weight = torch.randn(10, 8).double(), torch.randn(13, 8).double()
    x.requires_grad_()
    weight.requires_grad_()
    q = torch.log_softmax(2 * torch.randn(10, 13).double(), -1)
    log_q, ids = q.topk(4, -1)
    rest = q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    said = _said(log_q, ids, rest, temperature)
    targets = torch.randint(0, 13, (10,))
    mixed = mixed_cross_entropy(x, targets, weight, chunk=4, taught=said.taught(0.25, temperature))
    mine = torch.autograd.grad(mixed.total, [x, weight])

    logits = x @ weight.T
    p = torch.softmax(logits / temperature, -1)
    p_kept = p.gather(-1, ids)
    p_rest = 1 - p_kept.sum(-1)
    divergence = (log_q.exp() * (log_q - p_kept.log())).sum(-1)
    divergence = (divergence + rest.exp() * (rest - p_rest.log())).mean()
    total = 0.75 * F.cross_entropy(logits, targets) + 0.25 * temperature**2 * divergence
    torch.testing.assert_close(mixed.divergence, divergence.detach())
    for a, b in zip(mine, torch.autograd.grad(total, [x, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_all_tokens_kept_are_the_teacher_itself() -> None:
    """No class is left for the others."""
    torch.manual_seed(1)
    student, q = torch.randn(5, 13), torch.log_softmax(torch.randn(5, 13), -1)
    log_q, ids = q.topk(13, -1)
    said = _said(log_q, ids, torch.full((5,), -6e4), 1.0)
    kept = student.clone()
    torch.testing.assert_close(said.logits(slice(1, 4), student[1:4]), q[1:4])
    assert torch.equal(student, kept), "the student's logits are not written over"


def test_the_first_steps_are_those_of_the_teacher_in_memory(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig
) -> None:
    """With every token kept, but for float16."""
    config = dataclasses.replace(config, steps=4)
    every = dataclasses.replace(config, teacher_top=300)
    live = dataclasses.replace(config, teacher_top=0)
    train_here(every, text, tmp_path / "a", teacher=str(teacher), cache=str(tmp_path / "cache"))
    train_here(live, text, tmp_path / "b", teacher=str(teacher))
    assert _distances(tmp_path / "a") == pytest.approx(_distances(tmp_path / "b"), rel=5e-3)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=5e-3)


def test_a_second_run_needs_no_teacher_in_memory(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(Teacher, "open", refuse)
    _small_parts(monkeypatch)
    cache = student.parent / "cache"
    assert len(list(cache.glob("part-*.bin"))) > 2
    train_here(config, text, tmp_path / "run", teacher=str(teacher), cache=str(cache))
    assert losses(tmp_path / "run") == losses(student)
    assert _distances(tmp_path / "run") == _distances(student)
    with pytest.raises(AssertionError, match="was loaded"):
        train_here(
            config, text, tmp_path / "new", teacher=str(teacher), cache=str(tmp_path / "empty")
        )


def test_killed_and_continued_it_is_the_same_run(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path
) -> None:
    """Killed in the first epoch and in the third."""
    out, cache, kills = tmp_path / "run", str(tmp_path / "cache"), 0
    for wanted in (4, 18):
        status = signal_when(
            start(config, text, out, teacher=str(teacher), cache=cache),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        kills += status == SIGKILL_STATUS
    assert kills
    train_here(config, text, out, teacher=str(teacher), cache=cache)
    assert losses(out) == losses(student)
    assert _distances(out) == _distances(student)


def test_filling_goes_on_behind_the_parts_that_are_there(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """After a full disk, and in a run that is longer than the first one."""
    _small_parts(monkeypatch)
    written, write = [], teacher_cache.write_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "part-00002.bin" and len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(teacher_cache, "write_file", full)
    options: Any = {"teacher": str(teacher), "cache": str(tmp_path / "cache")}
    short = dataclasses.replace(config, steps=2)
    train_here(short, text, tmp_path / "short", **options)
    assert written == ["part-00000.bin"]
    with pytest.raises(OSError, match=r"No space left.*part-00002\.bin"):
        train_here(config, text, tmp_path / "run", **options)
    written.append("a third, so that there is room")
    train_here(config, text, tmp_path / "run", **options)
    assert written.count("part-00000.bin") == written.count("part-00001.bin") == 1
    for file in sorted((student.parent / "cache").iterdir()):
        assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes()


def test_two_runs_do_not_fill_one_cache(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second is refused by name; one that finds all it needs is not."""
    _small_parts(monkeypatch)
    cache = tmp_path / "cache"
    cache.mkdir()
    words = rf"the cache {cache} is in use by another run that fills it \(process {os.getpid()} on "
    with locked(cache, "the cache", "run"), pytest.raises(ValueError, match=words):
        train_here(config, text, tmp_path / "run", teacher=str(teacher), cache=str(cache))
    full = student.parent / "cache"
    with locked(full, "the cache", "run"):
        train_here(config, text, tmp_path / "other", teacher=str(teacher), cache=str(full))


def test_what_is_foreign_or_damaged_is_refused_by_name(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _small_parts(monkeypatch)
    cache = tmp_path / "cache"
    shutil.copytree(student.parent / "cache", cache)
    tokenizer = teacher / "tokenizer.json"
    other = write_teacher("qwen3", tmp_path / "qwen3", tokenizer, rows=300)
    more = tmp_path / "more.txt"
    more.write_text(text.read_text("utf-8") + "Another line.\n", "utf-8")

    def refused(
        message: str, changes: dict[str, Any], data: Path = text, place: Path = cache,
        who: Path = teacher,
    ) -> None:  # fmt: skip
        changed = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match=message):
            train_here(changed, data, tmp_path / "run", teacher=str(who), cache=str(place))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    refused("cache of another run: its teacher is", {}, who=other)
    refused("cache of another run: its data is", {}, data=more)
    refused(f"its top is {TOP}, this run's 9", {"teacher_top": 9})
    refused("its temperature is 1.5, this run's 1.0", {"temperature": 1.0})
    refused("its seed is 0, this run's 1", {"seed": 1})
    refused("its sequence_length is 16, this run's 8", {"sequence_length": 8})
    refused("cache .* needs teacher_top", {"teacher_top": 0})
    refused("holds 'cache' and is no cache", {}, place=tmp_path)
    refused("is a file and is no cache", {}, place=text)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    refused(r"needs 0.0 GiB more \(34 bytes a token\), 0.0 GiB are free", {}, place=cache / "new")
    with open(cache / "part-00001.bin", "r+b") as file:
        file.write(b"\0\1\2\3")
    refused(r"part-00001.bin is damaged", {})
    (cache / "part-00001.bin").unlink()
    refused(r"part-00001.bin is damaged or missing", {})
    index = json.loads((cache / "cache.json").read_text("utf-8"))
    (cache / "cache.json").write_text(json.dumps(index | {"version": 2}), "utf-8")
    refused("no cache of a teacher that this version reads", {})


def test_a_run_goes_on_as_it_began(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig, student: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(student, out)
    live = dataclasses.replace(config, teacher_top=0)
    with pytest.raises(ValueError, match=f"teacher_top: {TOP} -> 0"):
        train_here(live, text, out, teacher=str(teacher))


def test_two_ranks_learn_what_one_learns(
    tmp_path: Path, text: Path, teacher: Path, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, micro_batch_size=1, steps=10)
    for ranks in (1, 2):
        options: Any = {"teacher": str(teacher), "cache": str(tmp_path / f"cache{ranks}")}
        train_any(ranks, config, text, tmp_path / str(ranks), **options)
    one, two = tmp_path / "1", tmp_path / "2"
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert _distances(two) == pytest.approx(_distances(one), rel=2e-4)


def test_later_epochs_read_the_first_ones_windows(student: Path) -> None:
    """And each micro-batch's starts are told in the order in which it comes."""
    stream = open_stream(student / "tokens" / "train")
    order = WindowOrder(len(stream), 16, 0, same_windows=True)
    count = order.windows
    first, second = order.starts(0, count), order.starts(count, count)
    assert sorted(first) == sorted(second)
    assert list(first) != list(second)
    assert list(first) == list(WindowOrder(len(stream), 16, 0).starts(0, count))
    assert sorted(second) != sorted(WindowOrder(len(stream), 16, 0).starts(count, count))
    batches = Batches(stream, order, 2, CPU, Slice(8, 1, 2))
    pairs, starts = batches.run(16), batches.starts(16)
    for _ in range(5):
        x_BT, wanted = next(pairs)[0], stream.windows(next(starts), 16)
        assert np.array_equal(x_BT.numpy(), wanted)


def test_the_command_says_how_much_is_kept(teacher: Path) -> None:
    values: dict[str, Any] = {"recipe": "cpu_minute", "data": ("x",), "out": "y"}
    args = DistillArgs(**values, teacher=str(teacher), cache="z")
    assert args.config().teacher_top == 64
    assert args.options()["cache"] == "z"
    assert "top" not in args.options()
    assert dataclasses.replace(args, top=9).config().teacher_top == 9
    assert dataclasses.replace(args, cache=None).config().teacher_top == 0
    for wrong in ({"top": 0}, {"top": 5, "cache": None}):
        with pytest.raises(ValueError, match=f"top {wrong['top']} must be at least 1, and needs"):
            dataclasses.replace(args, **wrong).config()
    assert record_of(1 << 16, 64).itemsize == 258
    assert record_of((1 << 16) + 1, 64).itemsize == 386
