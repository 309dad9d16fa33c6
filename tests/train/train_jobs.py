"""Tiny training jobs, in this process, or in one of their own that a test can kill at any moment.

The start method is forkserver: one server imports torch once, each job is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.train import TrainConfig, run
from nomatmul.train.metrics import read_metrics

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nomatmul.train.job"])


WORDS = "the river runs under an old stone bridge where 3 boats wait for morning light"


def make_text(words: int, seed: int = 0) -> str:
    choose = random.Random(seed)
    lines = [" ".join(choose.choices(WORDS.split(), k=9)) + ".\n" for _ in range(words // 9)]
    return "".join(lines)


def tiny_config(**changes: object) -> TrainConfig:
    """12 steps; changes replace fields."""
    model = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, intermediate_size=64)
    values: dict = {
        "recipe": "tiny",
        "model": model,
        "sequence_length": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "valid_fraction": 0.05,
        "log_interval": 2,
        "eval_interval": 6,
        "eval_tokens": 200,
        "sample_interval": 0,
        "diagnostics_interval": 6,
        "checkpoint_interval": 3,
        "checkpoint_seconds": 0.0,
    }
    return TrainConfig(**(values | changes))


def losses(out: Path) -> list[float]:
    """The loss column of a run, one value a step."""
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


def held_out(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["valid_loss"]) for row in read_metrics(out) if "valid_loss" in row]


def train_here(config: TrainConfig, text: Path, out: Path, **options: Any) -> Any:
    """Run in this process, quietly."""
    return run(config, [str(text)], out, workers=1, device="cpu", quiet=True, **options)


def _job(config: dict, text: str, out: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    result = train_here(TrainConfig.from_dict(config), Path(text), Path(out), **options)
    sys.exit({"finished": 0, "stopped": 64, "interrupted": 65}[result.status])


def start(config: TrainConfig, text: Path, out: Path, **options: Any) -> BaseProcess:
    process = _CONTEXT.Process(target=_job, args=(config.to_dict(), str(text), str(out), options))
    process.start()
    return process


def signal_when(
    process: BaseProcess, number: int, ready: Callable[[], bool], limit: float = 120.0
) -> int | None:
    """Send the signal once ready() holds; the exit status (None: the process was still running)."""
    end = time.monotonic() + limit
    while not ready() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join(limit)
    return process.exitcode


def steps_on_disk(out: Path) -> int:
    """Rows in metrics.jsonl, complete or not."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


SIGKILL_STATUS = -signal.SIGKILL
