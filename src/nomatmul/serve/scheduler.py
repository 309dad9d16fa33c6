"""The engine thread: one loop that decodes all streams and reads all prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nomatmul.serve.job import Job, Ticket

if TYPE_CHECKING:
    from nomatmul.serve.cache import StateCache
    from nomatmul.serve.sequence import Served

T = TypeVar("T")


@dataclass(frozen=True)
class Stats:
    """Counts since the start, and what is going on now.

    running: choices that read or write. waiting: jobs of which no choice runs. submitted, refused
    (Busy), finished, cancelled, timed_out, failed, cut (shutdown): jobs. cached_tokens,
    computed_tokens: of prompts. steps, step_s, longest_step_s: of the model, its work between them
    (sampling, text, the cache) included.
    """

    running: int
    waiting: int
    max_streams: int
    max_queue: int
    submitted: int
    refused: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    cut: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    steps: int
    step_s: float
    longest_step_s: float


class Scheduler:
    """Runs jobs on the models of a server.

    max_streams: choices that run at the same time. max_queue: jobs that may wait. step_seconds: how
    long prompts may hold up the streams, see `policy.Pace`.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        cache: StateCache | None,
        *,
        max_streams: int = 16,
        max_queue: int = 64,
        step_seconds: float = 0.1,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the engine thread."""
        raise NotImplementedError

    def submit(self, job: Job) -> Ticket:
        """Take a job; of any thread, returns at once.

        Raises ValueError for a job that cannot run, Busy where no place is free, Closing.
        """
        raise NotImplementedError

    def cancel(self, ticket: Ticket) -> None:
        """End a job within one step; its running choices finish with "cancelled"."""
        raise NotImplementedError

    def call(self, work: Callable[[], T], client: str = "") -> Future[T]:
        """Run short work on the engine thread between two steps; raises Busy, Closing."""
        raise NotImplementedError

    def close(self, grace: float) -> None:
        """Refuse new jobs, let running choices end for `grace` seconds, cut the rest, and end.

        Returns when the thread has ended and the cache is written.
        """
        raise NotImplementedError

    def stats(self) -> Stats:
        """Counts of now; of any thread."""
        raise NotImplementedError
