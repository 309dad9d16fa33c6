"""What a request asks of the engine thread, and the news that it gets back.

A job is made of choices: number `prompt * n + k` is the k-th answer to a prompt. The engine thread
puts news of them into the job's ticket, a reader takes them whenever it is ready; what it has not
taken yet becomes one piece of news a choice, so that a slow reader never makes the server wait and
holds at most the job's own tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nomatmul.engine.sampling import Sampling

if TYPE_CHECKING:
    from nomatmul.serve.grammar import GrammarSpec

# How a choice is cut off; how it ends by itself is told at `Delta`.
CUTS = ("cancelled", "timeout", "shutdown", "error")


@dataclass(frozen=True)
class Job:
    """Prompts that a model is to continue.

    model: name of a served model. prompts: token ids, at least one each. max_tokens: tokens to make
    for each choice at most; 0 reads the prompts only. n: choices a prompt. sampling: as of
    `lm.generate`; choice number i draws with seed + i. stop, end_tokens: end an answer, the latter
    beside the model's own. logprobs: so many alternatives with each token, 0 for the token's own
    alone; None for no `Token`s. echo: `Token`s of the prompt's own tokens, too, where logprobs are
    asked for (the prompt's text is the caller's to repeat). grammar: what answers must follow.
    boundaries: positions of prompt 0 behind the ends of messages, where states are worth keeping.
    client: whose turn it is, for fairness between clients. timeout: seconds from submission. keep:
    name under which the state behind prompt 0 is pinned, and with it the document that it is of.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    echo: bool = False
    grammar: GrammarSpec | None = None
    boundaries: tuple[int, ...] = ()
    client: str = ""
    timeout: float | None = None
    keep: str | None = None
    document: str = ""

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class Token:
    """A made or echoed token, where logprobs were asked for.

    text: of this token alone; bytes that are no whole character are U+FFFD. An end token is among
    the made ones, by its name. logprob: None for the first token of an echoed prompt, which nothing
    predicts. top: (id, text, logprob) of the likeliest ones, best first.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...]


@dataclass
class Delta:
    """News of one choice.

    count: tokens made since the last news, an end token included. finish: None while it runs, then
    by itself ("stop": a stop string; "end": an end token; "length": max_tokens or the model's
    positions; "grammar": nothing may follow) or of CUTS.
    """

    index: int
    text: str = ""
    count: int = 0
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Usage:
    """Tokens and seconds of a job; final when the ticket is done.

    prompt_tokens = cached_tokens + computed_tokens once all prompts are read: a prompt counts once,
    however many choices it has. Seconds count from submission; None for what did not happen.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


class Busy(Exception):
    """No place in the queue; `retry_after` seconds are a guess at when there is one."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the server is busy: try again in {retry_after:g} seconds")
        self.retry_after = retry_after


class Closing(Exception):
    """The server takes no new work: it shuts down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Ticket:
    """A submitted job: news are put in by the engine thread and taken out by one reader.

    error: what went wrong, where a choice's finish is "error"; unanswerable: it is the request's
    own fault. submitted: `time.monotonic()`.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.usage = Usage(prompt_tokens=sum(map(len, job.prompts)))
        self.error: str | None = None
        self.unanswerable = False
        self.submitted = time.monotonic()
        self.reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None  # see `follow`
        self.read_whole = False  # see `collect`
        self._lock = threading.Lock()
        self._news: dict[int, Delta] = {}
        self._running = set(range(job.choices))  # without a finish
        self._untaken = job.choices  # finishes that were not taken

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish, taken or not."""
        return not self._running

    @property
    def done(self) -> bool:
        """Whether every choice has its finish and has been taken."""
        return self._untaken == 0

    def runs(self, index: int) -> bool:
        """Whether a choice has no finish yet."""
        return index in self._running

    def take(self) -> list[Delta]:
        """Return the news since the last call, one a choice, by index."""
        with self._lock:
            news, self._news = self._news, {}
            self._untaken -= sum(delta.finish is not None for delta in news.values())
        return [news[index] for index in sorted(news)]

    def put(
        self,
        index: int,
        text: str = "",
        count: int = 0,
        tokens: list[Token] | None = None,
        finish: str | None = None,
    ) -> None:
        """Add to the news of a choice that runs; of the engine thread alone."""
        assert index in self._running, "news of a choice that has ended"
        since, usage = time.monotonic() - self.submitted, self.usage
        with self._lock:  # who takes the finish finds the whole usage
            usage.completion_tokens += count
            if count and usage.first_token_s is None:
                usage.first_token_s = since
            if finish is not None:
                usage.total_s = since
                self._running.remove(index)
            delta = self._news.get(index)
            if delta is None:
                delta = self._news[index] = Delta(index)
            delta.text += text
            delta.count += count
            if tokens:
                delta.tokens += tokens
            delta.finish = finish
