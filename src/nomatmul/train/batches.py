"""Batches as a pure function of (seed, step): resuming needs the step number and nothing else.

The stream is cut into windows of T tokens; an epoch visits every window once, in an order and from
an offset that depend on (seed, epoch) only. Sample number s of the run (step * batch + row) is
window `order[s mod windows]` of epoch `s div windows`.

Many processes cut each step's batch into equal slices, one for each rank, so that the batch is the
same on any number of them.

Shapes: B rows of a micro-batch, T tokens. Inputs x_BT are tokens p..p+T-1, targets y_BT p+1..p+T;
of an encoder both are tokens p..p+T-1, the inputs with some of them hidden (masking.py).
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Generator, Iterator

import numpy as np
import torch

from nomatmul.train.masking import HELD_OUT_SEED, Masking
from nomatmul.train.plan import DevicePlan
from nomatmul.train.tokens import TokenStream

Pairs = Generator[tuple[torch.Tensor, torch.Tensor], None, None]


class WindowOrder:
    """Where each sample of a run starts in the stream.

    same_windows: all epochs have the windows of the first one, in other orders.
    Raises ValueError when the stream is too short for one window.
    """

    def __init__(
        self, stream_length: int, sequence_length: int, seed: int, same_windows: bool = False
    ) -> None:
        # One token is lost to the targets and up to T - 1 to the epoch's offset.
        self.windows = (stream_length - sequence_length) // sequence_length
        if self.windows < 1:
            raise ValueError(
                f"sequence_length {sequence_length} is too long for data of {stream_length} "
                f"tokens; at most {stream_length // 2}"
            )
        self.sequence_length = sequence_length
        self.seed, self.same_windows = seed, same_windows
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def starts(self, first_sample: int, count: int) -> np.ndarray:
        """[count] int64 positions of samples first_sample, first_sample + 1, ..."""
        parts = []
        while count:
            epoch, position = divmod(first_sample, self.windows)
            part = self._epoch_starts(epoch)[position : position + count]
            parts.append(part)
            first_sample += part.size
            count -= part.size
        return np.concatenate(parts)

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            random, offset = self._begin(epoch)
            if self.same_windows:
                _, offset = self._begin(0)
            self._starts = random.permutation(self.windows) * self.sequence_length + offset
            self._epoch = epoch
        return self._starts

    def _begin(self, epoch: int) -> tuple[np.random.Generator, int]:
        """The epoch's random numbers, and its offset, which is their first."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return random, int(random.integers(self.sequence_length))


@dataclasses.dataclass(frozen=True)
class Slice:
    """The rows of every batch that one of `size` ranks takes: the rank-th of equal parts."""

    batch_size: int
    rank: int = 0
    size: int = 1

    @property
    def rows(self) -> int:
        return self.batch_size // self.size

    def sample(self, own: int) -> int:
        """The run's number of this rank's sample `own` (own = step * rows + row)."""
        step, row = divmod(own, self.rows)
        return step * self.batch_size + self.rank * self.rows + row


class Batches:
    """Micro-batches of one rank on its device, without waiting for it.

    share: this rank's slice of each batch, of a multiple of `rows` rows; None: all of it. masking:
    of an encoder; None: the next token is the target.

    A small stream is copied to the GPU once, where a batch is one gather; a large one is read by a
    thread into pinned memory and copied while the GPU computes.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: WindowOrder,
        rows: int,
        plan: DevicePlan,
        share: Slice | None = None,
        masking: Masking | None = None,
    ) -> None:
        self.masking = masking
        self.length = order.sequence_length + (1 if masking is None else 0)
        self.stream, self.order, self.rows = stream, order, rows
        self.device, self.pinned = plan.device, plan.pinned
        self.share = share if share is not None else Slice(rows)
        assert self.share.rows % rows == 0
        size = len(stream) * stream.shards[0].dtype.itemsize
        self._resident = None
        if size <= plan.resident_bytes:
            self._resident = _signed(stream.read(0, len(stream))).to(self.device)
            self._steps_T = torch.arange(self.length, device=self.device)

    def run(self, first_sample: int) -> Pairs:
        """(x_BT, y_BT) int64 without end, from the batch at sample first_sample on.

        first_sample counts the samples of all ranks. Close it when done.
        """
        assert first_sample % self.share.batch_size == 0 or self.share.size == 1
        first_sample //= self.share.size
        if self._resident is not None:
            return self._from_device(first_sample)
        if self.pinned:
            return self._from_thread(first_sample)
        return self._from_host(first_sample)

    def starts(self, first_sample: int) -> Iterator[np.ndarray]:
        """Where the windows [B] of each micro-batch of `run(first_sample)` start, without end."""
        sample = first_sample // self.share.size
        while True:
            yield self._starts(sample, 1)
            sample += self.rows

    def _from_device(self, sample: int) -> Pairs:
        assert self._resident is not None
        while True:
            # One copy of starts for many batches, so that the host seldom talks to the device.
            table = np.stack([self._starts(sample, 64), self._numbers(sample, 64)])
            table_2NB = torch.from_numpy(table).pin_memory().to(self.device, non_blocking=True)
            starts_NB, numbers_NB = table_2NB.view(2, 64, self.rows)
            for starts_B, numbers_B in zip(starts_NB, numbers_NB, strict=True):
                ids = _unsigned(self._resident[starts_B[:, None] + self._steps_T])
                yield self._pair(ids, numbers_B)
            sample += 64 * self.rows

    def _pair(
        self, ids: torch.Tensor, numbers_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the windows ids [B, length], samples numbers_B of the run."""
        if self.masking is not None:
            return self.masking(ids, numbers_B)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _firsts(self, sample: int, micro_batches: int) -> list[int]:
        """The run's numbers of the first samples of the next micro-batches of this rank."""
        own = range(sample, sample + micro_batches * self.rows, self.rows)
        return [self.share.sample(first) for first in own]

    def _starts(self, sample: int, micro_batches: int) -> np.ndarray:
        """Where the windows of the next micro-batches start; sample: number among this rank's."""
        if self.share.size == 1:
            return self.order.starts(sample, micro_batches * self.rows)
        return np.concatenate(
            [self.order.starts(first, self.rows) for first in self._firsts(sample, micro_batches)]
        )

    def _numbers(self, sample: int, micro_batches: int) -> np.ndarray:
        """int64 numbers in the run of the samples at `_starts`."""
        firsts = np.asarray(self._firsts(sample, micro_batches), dtype=np.int64)
        return (firsts[:, None] + np.arange(self.rows)).reshape(-1)

    def _host_batch(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(windows int64 [B, length], numbers int64 [B])."""
        ids = self.stream.windows(self._starts(sample, 1), self.length)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(self._numbers(sample, 1))

    def _from_host(self, sample: int) -> Pairs:
        while True:
            ids, numbers_B = self._host_batch(sample)
            yield self._pair(ids.to(self.device), numbers_B.to(self.device))
            sample += self.rows

    def _from_thread(self, sample: int) -> Pairs:
        ready: queue.Queue[list[torch.Tensor] | BaseException] = queue.Queue(maxsize=4)
        stop = threading.Event()

        def read() -> None:
            position = sample
            try:
                while not stop.is_set():
                    pinned = [part.pin_memory() for part in self._host_batch(position)]
                    _put(ready, pinned, stop)
                    position += self.rows
            except BaseException as error:  # raised again where batches are taken
                _put(ready, error, stop)

        thread = threading.Thread(target=read, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                ids, numbers_B = (part.to(self.device, non_blocking=True) for part in item)
                yield self._pair(ids, numbers_B)
        finally:
            stop.set()
            thread.join()


def held_out_batches(
    stream: TokenStream, sequence_length: int, rows: int, max_tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The stream's head once, in order, in fixed shapes: (x_BT, y_BT, targets that count).

    What is not predicted has target -100.

    Every token but the first is predicted once, from at most sequence_length tokens before it.
    """
    total = held_out_length(stream, max_tokens)
    span = sequence_length * rows
    for first in range(0, total - 1, span):
        last = min(first + span + 1, total)
        ids = np.full(span + 1, -100, dtype=np.int64)
        ids[: last - first] = stream.read(first, last)
        x = torch.from_numpy(np.maximum(ids[:-1], 0)).view(rows, sequence_length)
        y = torch.from_numpy(ids[1:]).view(rows, sequence_length)
        yield x.to(device), y.to(device), last - first - 1


def held_out_masked(
    stream: TokenStream,
    sequence_length: int,
    rows: int,
    max_tokens: int,
    masking: Masking,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The stream's head once, in order, for an encoder: (x_BT, y_BT, targets that count).

    Whole windows only, the same tokens hidden in every run. Raises ValueError when the stream is
    shorter than one window.
    """
    windows = min(len(stream), max(max_tokens, sequence_length)) // sequence_length
    if windows < 1:
        raise ValueError(
            f"sequence_length {sequence_length} is too long for {len(stream)} held-out tokens"
        )
    masking = dataclasses.replace(masking, seed=HELD_OUT_SEED)
    for first in range(0, windows, rows):
        numbers_B = np.arange(first, first + rows)
        count = min(rows, windows - first)
        starts_B = np.minimum(numbers_B, windows - 1) * sequence_length
        ids = stream.windows(starts_B, sequence_length).astype(np.int64)
        x, y = masking(torch.from_numpy(ids), torch.from_numpy(numbers_B))
        y[count:] = -100
        yield x.to(device), y.to(device), count * masking.count


def held_out_length(stream: TokenStream, max_tokens: int) -> int:
    """Tokens that an evaluation reads."""
    return min(len(stream), max_tokens + 1)


def _signed(ids: np.ndarray) -> torch.Tensor:
    """uint16 as int16 bits and uint32 as int32 bits: torch indexes only signed types everywhere."""
    return torch.from_numpy(ids.view(f"i{ids.dtype.itemsize}"))


def _unsigned(ids: torch.Tensor) -> torch.Tensor:
    return ids.to(torch.int64) & (0xFFFF if ids.dtype == torch.int16 else 0xFFFFFFFF)


def _put(
    ready: queue.Queue, item: list[torch.Tensor] | BaseException, stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
