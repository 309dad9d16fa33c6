"""The processes of one run: which of them this is, and how they agree.

One process (no torchrun) is `Ranks.alone()`: every method then answers at once, and torch's
process groups are never touched. What processes tell each other here goes over the CPU (gloo);
parameters and gradients go over FSDP's own group.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nomatmul.train.args import started_by_torchrun
from nomatmul.train.plan import device_of_rank
from nomatmul.train.watch import FAILED, INTACT, Watch

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DEVICE_SLACK = 60.0  # seconds by which the device's own time limit, which aborts, comes later
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")


class LostRankError(RuntimeError):
    """Another process of the run is gone or does not answer."""

    reported: bool  # set as by `Ranks.fail`


class OtherRankError(RuntimeError):
    """Another process failed and has said why; this one ends too."""


class Ranks:
    """This process among the `size` of its run. Rank 0 is the one that prints and writes."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._store: Any = None
        self._group: Any = None
        self._watch: Watch | None = None
        self._works = 0

    @classmethod
    def alone(cls) -> Ranks:
        """The one process of a run without torchrun."""
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.size > 1

    @property
    def group(self) -> Any:
        """The CPU's process group, None when alone."""
        return self._group

    def begin(self, operation: str) -> None:
        """Name what the main thread does from now on; it must not take longer than the limit."""
        if self._watch is not None:
            self._watch.begin(operation)

    def most(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if not self.many:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.speaking():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, as float64 on the CPU; one rounding order for all."""
        values = values.detach().double().cpu()
        if self.many:
            with self.speaking():
                dist.all_reduce(values, group=self._group)
        return values

    def sum_on_device(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, left where the value is; nobody waits for it."""
        if self.many:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: T) -> T:
        """Rank 0's value, at all."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. Values are pickled: plain ones only."""
        if not self.many:
            return [value]
        values: list[Any] = [None] * self.size
        with self.speaking():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def on_first(self, operation: str, work: Callable[[], T]) -> T:
        """Rank 0 does it, however long it takes; all get the result, which must survive JSON."""
        if not self.many:
            return work()
        assert self._watch is not None
        self._watch.begin(operation, limited=False)
        self._works += 1
        key = f"work/{self._works}"
        if self.first:
            self._store.set(key, json.dumps(work()))
        while not self._store.check([key]):
            if self._store.check([FAILED]):
                raise OtherRankError(self._store.get(FAILED).decode())
            time.sleep(0.05)
        return json.loads(self._store.get(key))

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends.

        `error.reported` becomes whether it is the first to fail: the one that reports it.
        """
        if self.many:
            # of any exception: who catches it at the top reads it there
            error.reported = self._first_to_fail(error)  # type: ignore[attr-defined]

    def _first_to_fail(self, error: BaseException) -> bool:
        try:
            if self._store.add("failures", 1) > 1:
                return False
            self._store.set(FAILED, f"rank {self.rank}: {error}")
        except Exception:  # the store ended with the process that kept it: nobody else can speak
            return not isinstance(error, OtherRankError)
        return True

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """What torch.distributed raises when a process is gone becomes LostRankError."""
        try:
            yield
        except RuntimeError as error:
            if not self.many or not _is_of_the_network(error):
                raise
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> Exception:
        assert self._watch is not None
        operation = self._watch.operation
        lost = self._watch.lost()
        with contextlib.suppress(Exception):  # a store that is gone says nothing
            if self._store.check([FAILED]):
                return OtherRankError(self._store.get(FAILED).decode())
        if lost:
            return LostRankError(f"{lost} was lost in {operation}{INTACT}")
        others = self._watch.others()
        return LostRankError(f"{operation} did not come to an end; {others}{INTACT}")

    def watch_signals(self, terminated: Callable[[], bool]) -> None:
        """terminated: was this process told to stop? Asked where the others are gone."""
        if self._watch is not None:
            self._watch.terminated = terminated

    def close(self) -> None:
        """Leave the group; only after everybody is done."""
        if not self.many:
            return
        with contextlib.suppress(LostRankError, OtherRankError):
            self.most(0.0)
        assert self._watch is not None
        self._watch.close()
        dist.destroy_process_group()


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it, which it also does as a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in _LOST)


def open_ranks(device: str, timeout: float) -> tuple[Ranks, str]:
    """Join the other processes. Returns (ranks, name of this process's device).

    device: "auto", "cpu" or "cuda"; timeout: seconds to wait for a process that does not answer.
    Raises ValueError for a device that not every process can have, and for a bad environment.
    """
    if not timeout > 0:
        raise ValueError(f"collective-timeout {timeout:g} must be above 0 seconds")
    if not started_by_torchrun():
        return Ranks.alone(), device
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {missing[0]} is not: start with torchrun")
    rank, size, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    name = device_of_rank(device, local)
    if (
        os.environ.get("LOCAL_WORLD_SIZE") == str(size)
        and "lo" in dict(socket.if_nameindex()).values()
    ):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # else the host's name must have an address
    limit = datetime.timedelta(seconds=timeout)
    ranks = Ranks(rank, size, local)
    try:
        ranks._store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))
        cuda = name.startswith("cuda")
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("groups", ranks._store),
            rank=rank,
            world_size=size,
            timeout=limit + datetime.timedelta(seconds=_DEVICE_SLACK if cuda else 0),
        )
        ranks._group = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        lost = LostRankError(f"rank {rank} could not join the other processes: {reason}")
        lost.reported = True  # each process only knows of itself
        raise lost from error
    ranks._store = dist.PrefixStore("nomatmul", ranks._store)
    clone = getattr(ranks._store, "clone", lambda: ranks._store)  # torch below 2.7 has none
    ranks._watch = Watch(clone(), rank, size, timeout)
    return ranks, name
