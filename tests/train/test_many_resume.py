"""A run goes on with the same losses on another number of processes; on the same one, bit for bit.

Also: signals, lost and stopped processes, mistakes that only several processes can make.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_jobs import Job, start_many, train_any, train_many
from train_jobs import losses, steps_on_disk, tiny_config, train_here

from nomatmul.train import TrainConfig
from nomatmul.train.checkpoints import CheckpointError
from nomatmul.train.manifest import find_fault
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import open_ranks

# Another cut of a batch sums in another order. In a ternary model that may flip a rounding, and one
# flip moves the loss of such a small model: weights changed by 1e-7 of themselves moved losses by
# 8e-5 (median of 24) to 4e-3, those of its dense twin by 6e-7 at most.
CLOSE = {"rel": 2e-2}
EQUAL = {"rel": 1e-5}


def config_of_many(**changes: object) -> TrainConfig:
    return tiny_config(
        micro_batch_size=1, log_interval=1, schedule="constant",
        eval_interval=0, diagnostics_interval=0, **changes,
    )  # fmt: skip


def part(config: TrainConfig, steps: int) -> TrainConfig:
    return dataclasses.replace(config, steps=steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[int, Path]:
    """Uninterrupted runs of 12 steps in one and in two processes."""
    outs = {}
    for ranks in (1, 2):
        outs[ranks] = tmp_path_factory.mktemp("whole") / f"{ranks}"
        train_any(ranks, config_of_many(), text_file, outs[ranks])
    return outs


def stop_at(out: Path, step: int) -> None:
    """Make the directory of a run what it was when checkpoint `step` was the newest."""
    for path in (out / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    (out / "checkpoints/latest").write_text(f"step-{step:08d}")
    shutil.rmtree(out / "model", ignore_errors=True)


def test_resumed_on_as_many_ranks_the_losses_are_equal(
    whole: dict[int, Path], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[2], out)
    stop_at(out, 9)
    train_any(2, config_of_many(), text_file, out)
    assert losses(out) == losses(whole[2])


def test_resumed_on_one_two_and_four_ranks_the_losses_go_on(
    whole: dict[int, Path], tmp_path: Path, text_file: Path
) -> None:
    """1 -> 2 -> 4 -> 1, three steps each: each step starts from what the others wrote."""
    out = tmp_path / "run"
    config = config_of_many(checkpoint_keep=9)
    for ranks, steps in ((1, 3), (2, 6), (4, 9), (1, 12)):
        shutil.rmtree(out / "model", ignore_errors=True)
        if ranks == 1:
            train_here(part(config, steps), text_file, out, override_config=True)
        else:
            job = train_many(ranks, part(config, steps), text_file, out, override_config=True)
            assert job.join() == [0] * ranks, job.everything()
        newest = out / f"checkpoints/step-{steps:08d}"
        assert find_fault(newest) is None
        assert (newest / "shards").is_dir() == (ranks > 1)
    assert losses(out) == pytest.approx(losses(whole[1]), **CLOSE)


def test_another_micro_batch_is_no_other_run(
    whole: dict[int, Path], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[2], out)
    stop_at(out, 9)
    wide = dataclasses.replace(config_of_many(), micro_batch_size=4, recompute="block")
    train_here(wide, text_file, out)
    assert losses(out) == pytest.approx(losses(whole[1]), **CLOSE)
    assert losses(out)[:9] == losses(whole[2])[:9]


@pytest.mark.parametrize("changes", [{"micro_batch_size": 4}, {"recompute": "block"}])
def test_another_cut_of_a_batch_gives_a_dense_model_the_same_losses(
    tmp_path: Path, text_file: Path, changes: dict[str, object]
) -> None:
    dense = dataclasses.replace(config_of_many().model, linear="dense")
    config = config_of_many(model=dense, checkpoint_interval=12)
    train_here(config, text_file, tmp_path / "one")
    train_here(dataclasses.replace(config, **changes), text_file, tmp_path / "other")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), **EQUAL)


@pytest.mark.parametrize("kind", [1, 2], ids=["files", "shards"])
def test_a_checkpoint_of_another_shape_is_refused_by_name(
    kind: int, whole: dict[int, Path], config: TrainConfig
) -> None:
    from nomatmul.train.checkpoints import restore
    from nomatmul.train.model import build_model
    from nomatmul.train.optimizer import build_optimizer

    path = whole[kind] / "checkpoints/step-00000012"
    for changes, message in (
        ({"vocab_size": 299}, r"embedding.weight has shape \[300, 32\], .* needs \[299, 32\]"),
        ({"num_layers": 3}, r"it lacks layers\.2\."),
        ({"num_layers": 1}, r"layers\.1\..* is unknown|lower_bounds has shape"),
    ):
        model = build_model(dataclasses.replace(config.model, **changes))
        with pytest.raises(CheckpointError, match=message):
            restore(path, model, build_optimizer(model, config, DevicePlan(torch.device("cpu"))))


def when(job: Job, ready: Callable[[], bool], act: Callable[[], None], limit: float = 60) -> None:
    """Act once ready() holds."""
    end = time.monotonic() + limit
    while not ready() and time.monotonic() < end:
        assert any(process.is_alive() for process in job.processes), job.everything()
        time.sleep(0.005)
    act()


def running(out: Path, ranks: int, text: Path, timeout: float = 60.0) -> Job:
    """A job without end that has a checkpoint at step 3 and runs on."""
    config = config_of_many(steps=100_000)
    config = dataclasses.replace(config, checkpoint_interval=100_000, log_interval=1)
    return train_many(ranks, config, text, out, collective_timeout=timeout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: int, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "run"
    job = running(out, 2, text_file)
    pid = job.processes[1].pid
    assert pid is not None
    when(job, lambda: steps_on_disk(out) >= 3, lambda: os.kill(pid, number))
    assert job.join() == [130 if number == signal.SIGINT else 0] * 2, job.everything()
    step = len(losses(out))
    newest = out / f"checkpoints/step-{step:08d}"
    assert find_fault(newest) is None
    assert f"at step {step}; the same command continues" in job.everything()
    assert not job.said()


def lost_job(tmp_path: Path, text: Path, number: int, timeout: float) -> tuple[Job, list, Path]:
    """A job of two, of which rank 1 gets the signal after a checkpoint at step 3."""
    out = tmp_path / "run"
    config = dataclasses.replace(config_of_many(steps=100_000), checkpoint_keep=1)
    job = train_many(2, config, text, out, collective_timeout=timeout)
    pid = job.processes[1].pid
    assert pid is not None
    when(job, lambda: steps_on_disk(out) >= 5, lambda: os.kill(pid, number))
    if number == signal.SIGSTOP:
        job.processes[0].join(60)
        os.kill(pid, signal.SIGKILL)
    return job, job.join(60), out


@pytest.mark.parametrize(
    ("number", "timeout"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 3.0)], ids=["killed", "hung"]
)
def test_a_lost_rank_ends_the_job_with_one_line(
    number: int, timeout: float, tmp_path: Path, text_file: Path
) -> None:
    job, statuses, out = lost_job(tmp_path, text_file, number, timeout)
    assert statuses == [1, -signal.SIGKILL], job.everything()
    said = job.said()
    assert len(said) == 1, job.everything()
    assert "rank 1 " in said[0]
    assert "the last checkpoint is intact" in said[0]
    newest = out / "checkpoints" / (out / "checkpoints/latest").read_text()
    assert find_fault(newest) is None


def _hang_in_python(config: dict, text: str, out: str, options: dict) -> None:
    """As `train_job`, but rank 1 sleeps in its fourth step; it still shows signs of life."""
    from many_jobs import train_job

    from nomatmul.train.loop import Loop

    step = Loop.take_step

    def sleepy(self: Loop, *arguments: Any) -> Any:
        if self.step == 3 and os.environ["RANK"] == "1":
            time.sleep(60)
        return step(self, *arguments)

    Loop.take_step = sleepy  # type: ignore[method-assign]
    train_job(config, text, out, options)


def test_a_collective_that_one_rank_never_reaches_ends_by_the_limit(
    tmp_path: Path, text_file: Path
) -> None:
    options = {"collective_timeout": 2.0}
    arguments = (config_of_many().to_dict(), str(text_file), str(tmp_path / "run"), options)
    job = start_many(2, tmp_path / "run", _hang_in_python, *arguments)
    assert job.join(60) == [1, 1], job.everything()
    assert len(job.said()) == 1, job.everything()
    assert "training step 4 did not " in job.said()[0]
    assert find_fault(tmp_path / "run/checkpoints/step-00000003") is None


def _with_a_full_disk(config: dict, text: str, out: str, options: dict) -> None:
    """As `train_job`, but after step 3 rank 1 may write short files only."""
    import resource

    from many_jobs import train_job

    from nomatmul.train.loop import Loop

    step = Loop.take_step

    def full(self: Loop, *arguments: Any) -> Any:
        if self.step == 3 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return step(self, *arguments)

    Loop.take_step = full  # type: ignore[method-assign]
    train_job(config, text, out, options)


def test_a_full_disk_at_one_rank_leaves_the_previous_checkpoint(
    tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "run"
    arguments = (config_of_many().to_dict(), str(text_file), str(out), {})
    job = start_many(2, out, _with_a_full_disk, *arguments)
    assert job.join(60) == [1, 1], job.everything()
    assert len(job.said()) == 1, job.everything()
    assert "cannot write checkpoint" in job.said()[0]
    assert "rank 1: " in job.said()[0]
    assert "step-00000003 is intact" in job.said()[0]
    assert [path.name for path in (out / "checkpoints").glob("*step*")] == ["step-00000003"]
    assert find_fault(out / "checkpoints/step-00000003") is None


def test_an_error_of_one_rank_is_reported_once_and_ends_all(
    tmp_path: Path, text_file: Path
) -> None:
    """Rank 0 alone finds that the text is empty."""
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    job = train_many(2, config_of_many(), empty, tmp_path / "run")
    assert job.join() == [1, 1], job.everything()
    assert len(job.said()) == 1, job.everything()
    assert "empty.txt is empty" in job.said()[0]


def test_nan_stops_all_ranks(tmp_path: Path, text_file: Path) -> None:
    config = dataclasses.replace(config_of_many(steps=200), learning_rate=1e30, warmup_steps=0)
    job = train_many(2, config, text_file, tmp_path / "run")
    assert job.join() == [1, 1], job.everything()
    assert len(job.said()) == 1, job.everything()
    assert "Try a lower learning_rate" in job.said()[0] or "is not finite" in job.said()[0]


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path, text_file: Path) -> None:
    for config, message in (
        (tiny_config(micro_batch_size=4), r"multiple of ranks x micro_batch_size \(2 x 4\): try "
         r"--set micro_batch_size=2"),
        (tiny_config(batch_size=3, micro_batch_size=1), r"try --set batch_size=4"),
    ):  # fmt: skip
        from nomatmul.train.job import check_ranks

        check_ranks(config, 1)
        with pytest.raises(ValueError, match=message):
            check_ranks(config, 2)
    job = train_many(2, tiny_config(micro_batch_size=4), text_file, tmp_path / "run")
    assert job.join() == [1, 1], job.everything()
    assert len(job.said()) == 1, job.everything()
    assert "batch_size 4 must be a multiple" in job.said()[0]
    assert not (tmp_path / "run/run.json").exists()


def test_devices_that_not_every_rank_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes but 2 GPUs .* --nproc-per-node 2$"):
        open_ranks("cuda", 60)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"4 processes but 0 GPUs .* --device cpu$"):
        open_ranks("cuda", 60)
    with pytest.raises(ValueError, match=r"'cuda:1': torchrun gives each process a GPU of its own"):
        open_ranks("cuda:1", 60)
    with pytest.raises(ValueError, match="collective-timeout 0 must be above 0"):
        open_ranks("cpu", 0)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT is not: start with torchrun"):
        open_ranks("cpu", 60)
