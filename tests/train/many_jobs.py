"""Training jobs of several processes, as torchrun would start them, on the CPU over gloo.

The parent keeps the store, as torchrun does, so it outlives every process of the job.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from train_jobs import train_here

from nomatmul.train import TrainConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nomatmul.train.job", "torch.distributed.checkpoint"])


@dataclasses.dataclass
class Job:
    """The processes of a job, by rank, and where each writes its stderr."""

    processes: list[BaseProcess]
    errors: list[Path]
    store: Any

    def join(self, limit: float = 120.0) -> list[int | None]:
        """Exit status of each; what still runs after `limit` seconds is killed: None."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.1))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return statuses

    def said(self) -> list[str]:
        """All lines of all processes on stderr that are errors of ours."""
        lines = [line for path in self.errors for line in path.read_text("utf-8").splitlines()]
        return [line for line in lines if line.startswith("nomatmul: error")]

    def everything(self) -> str:
        return "\n".join(path.read_text("utf-8") for path in self.errors)


def start_many(ranks: int, out: Path, work: Callable[..., None], *arguments: Any) -> Job:
    """`work(*arguments)` in each of `ranks` processes."""
    store = dist.TCPStore(
        "127.0.0.1", 0, ranks + 1, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    errors = [out.parent / f"{out.name}-rank{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = _CONTEXT.Process(
            target=_enter, args=(environment, str(errors[rank]), work, arguments)
        )
        process.start()
        processes.append(process)
    return Job(processes, errors, store)


def _enter(
    environment: dict[str, str], errors: str, work: Callable[..., None], arguments: tuple
) -> None:
    import torch

    os.environ.update(environment)
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    torch.set_num_threads(1)
    work(*arguments)


def train_job(config: dict, text: str, out: str, options: dict[str, Any]) -> None:
    """What `nomatmul train` does in such a process, or `distill`; with the config given whole."""
    from nomatmul.train.args import TrainArgs
    from nomatmul.train.distill import DistillArgs
    from nomatmul.train.main import _leave, _one_of_many

    kind = DistillArgs if "teacher" in options else TrainArgs
    args = kind("tiny", (text,), out, workers=1, device="cpu", quiet=True, **options)
    parsed = TrainConfig.from_dict(config)
    module = sys.modules["nomatmul.train.main"]
    module.build_config = lambda _: parsed  # type: ignore[attr-defined]
    _leave(_one_of_many(args))


def train_many(ranks: int, config: TrainConfig, text: Path, out: Path, **options: Any) -> Job:
    """Start a training of `ranks` processes."""
    return start_many(ranks, out, train_job, config.to_dict(), str(text), str(out), options)


def train_any(ranks: int, config: TrainConfig, text: Path, out: Path, **options: Any) -> None:
    """Train to the end, in this process or in several."""
    if ranks == 1:
        train_here(config, text, out, **options)
        return
    job = train_many(ranks, config, text, out, **options)
    assert job.join() == [0] * ranks, job.everything()
