"""What one client sees of our server: a single stream, second turns, edits, a prompt that disturbs.

A library of serve_load.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Side
from serve_client import Answer, complete
from serve_models import token_ids
from serve_sides import Served, ours

CALM = 12  # events of a stream before it is disturbed
BOX_END = 0  # the end token of the model in the box; the others have none


@dataclass
class Setting:
    """One model and how it is measured. shape: fields of its ModelConfig."""

    size: str
    shape: dict[str, Any]
    scratch: Path
    arguments: argparse.Namespace

    @property
    def model(self) -> Path | None:
        """The packed directory; None: the model in the box."""
        return None if self.size == "box" else self.scratch / "model"

    @property
    def models(self) -> list[str]:
        """What the server is given."""
        return [] if self.model is None else [f"model={self.model}"]

    @property
    def ban(self) -> list[int]:
        """Tokens that must not end an answer early."""
        return [BOX_END] if self.size == "box" else []

    def ids(self, count: int, seed: int) -> list[int]:
        return token_ids(count, self.shape["vocab_size"], seed)

    def body(self, ids: list[int], count: int, ours: bool = True) -> dict[str, Any]:
        """A completion of the likeliest tokens, `count` of them."""
        name = "nomatmul-box" if self.size == "box" else "model"
        body = {"model": name, "prompt": ids, "max_tokens": count, "temperature": 0}
        if ours and self.ban:
            body["logit_bias"] = {str(token): -100 for token in self.ban}
        return body

    @contextlib.contextmanager
    def server(self, *options: str) -> Iterator[Served]:
        """Ours on the best instruction set asked for."""
        arguments = self.arguments
        server = ours("nomatmul", self.models, arguments.threads, *options, isa=arguments.isas[0])
        try:
            yield server
        finally:
            server.close()

    @contextlib.contextmanager
    def inside(self) -> Iterator[Side]:
        """The engine alone, in a process."""
        side = Side("our_side.py", {"NOMATMUL_ISA": self.arguments.isas[0]})
        try:
            path = None if self.model is None else str(self.model)
            side.ask("open", path=path, threads=self.arguments.threads)
            yield side
        finally:
            side.close()


def one(setting: Setting) -> dict[str, Any]:
    """tokens/s of one stream: in a process, through the server whole, and streamed."""
    arguments = setting.arguments
    rates: dict[str, list[float]] = {"inside": [], "whole": [], "streamed": []}
    with setting.server() as server, setting.inside() as inside:
        for number in range(arguments.repeats + 1):
            ids, count = setting.ids(16, 20_000 + number), arguments.tokens
            found = inside.ask("generate", ids=ids, count=count, ban=setting.ban)
            turn = {"inside": found["tokens_per_second"]}
            for what, stream in (("whole", False), ("streamed", True)):
                # a prompt of its own, so that neither finds the other's state
                body = setting.body([setting.ids(1, 30_000 + 2 * number + stream)[0], *ids], count)
                answer = _asked(server, {**body, "stream": stream})
                turn[what] = count / (answer.end - answer.start)
            if number:  # the first turn warms
                for what, rate in turn.items():
                    rates[what].append(rate)
    median = {what: statistics.median(values) for what, values in rates.items()}
    shares = {what: median[what] / median["inside"] for what in ("whole", "streamed")}
    return {"rates": rates, "median": median, "share": shares}


def second(setting: Setting) -> dict[str, Any]:
    """Seconds to the first token of a second turn, and of what it is compared with."""
    arguments, turns, restarted = setting.arguments, [], []
    directory = setting.scratch / "states"
    with setting.inside() as inside:
        with setting.server("--state-dir", str(directory)) as server:
            histories = []
            for number in range(arguments.repeats):
                history = _history(setting, inside, server, number)
                histories.append(history)
                turn = _turn(setting, inside, server, history, 41_000 + number)
                alone = setting.body(setting.ids(arguments.new, 42_000 + number), 4)
                turn["alone"] = _asked(server, {**alone, "stream": True}).first
                turns.append(turn)
        with setting.server("--state-dir", str(directory)) as server:
            for number, history in enumerate(histories):
                restarted.append(_turn(setting, inside, server, history, 43_000 + number))
    return {"turns": turns, "restarted": restarted}


def _history(setting: Setting, inside: Side, server: Served, number: int) -> list[int]:
    """Ids of a first turn and its answer, which the server has seen."""
    arguments = setting.arguments
    answer = min(64, arguments.history // 2)
    prompt = setting.ids(arguments.history - answer, 40_000 + number)
    made = inside.ask("generate", ids=prompt, count=answer, ban=setting.ban)["ids"]
    _asked(server, setting.body(prompt, answer))
    return [*prompt, *made]


def _turn(
    setting: Setting, inside: Side, server: Served, history: list[int], seed: int
) -> dict[str, Any]:
    new = setting.ids(setting.arguments.new, seed)
    body = {**setting.body([*history, *new], 4), "stream": True}
    answer = _asked(server, {**body, "stream_options": {"include_usage": True}})
    found = inside.ask("behind", history=history, new=new)
    return {
        "first": answer.first,
        "computed": _computed(answer),
        "inside": found["seconds"],
        "read": found["read"],
    }


def edits(setting: Setting) -> dict[str, Any]:
    """Ten turns over a tree of a conversation: tokens that the server computed, and the new ones.

    A turn goes on behind the answer of an earlier one, `None` begins, and a parent that comes again
    is an edited message or a branch.
    """
    parents = [None, 0, 1, 0, 3, 1, 2, 6, 0, 8]
    new, computed = [], []
    prompt: list[int] = []
    nodes: list[list[int]] = []
    with setting.server() as server, setting.inside() as inside:
        for number, parent in enumerate(parents):
            before = [] if parent is None else nodes[parent]
            ids = setting.ids(20 + 7 * number, 50_000 + number)
            prompt = [*before, *ids]
            found = inside.ask("generate", ids=prompt, count=16, ban=setting.ban)
            answer = _asked(server, setting.body(prompt, 16))
            new.append(len(ids))
            computed.append(_computed(answer))
            nodes.append([*prompt, *found["ids"]])
        again = _asked(server, setting.body(prompt, 16))  # regenerated: nothing is new
    return {"new": [*new, 0], "computed": [*computed, _computed(again)]}


def gap(setting: Setting) -> dict[str, Any]:
    """Gaps in a running stream before and while a long prompt is read."""
    arguments = setting.arguments
    count = 3500 if setting.shape.get("token_mixer") else 20_000  # more than it will make
    body = {
        **setting.body(setting.ids(16, 60_000), min(count, 20 * arguments.long)),
        "stream": True,
    }
    long = {**setting.body(setting.ids(arguments.long, 60_001), 4), "stream": True}
    running = Answer(0.0)

    async def run(server: Served) -> tuple[float, Answer]:
        task = asyncio.ensure_future(complete(server.address, server.path, body, running))
        while len(running.times) < CALM and not task.done():
            await asyncio.sleep(0.01)
        at = time.perf_counter()
        answer = await complete(server.address, server.path, long)
        task.cancel()  # the connection closes, and its work ends
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return at, answer

    with setting.server() as server:
        at, answer = asyncio.run(run(server))
    if answer.error or running.error:
        raise RuntimeError(f"{answer.error} {running.error}")
    times = running.times
    pairs = list(itertools.pairwise(times))
    meanwhile = [b - a for a, b in pairs if b > at and a < answer.times[0]]
    return {
        "calm": statistics.median(b - a for a, b in pairs if b <= at),
        "longest": max(meanwhile, default=0.0),
        "median": statistics.median(meanwhile) if meanwhile else 0.0,
        "events": len(meanwhile),
        "long_first": answer.first,
    }


def _asked(server: Served, body: dict[str, Any]) -> Answer:
    """One request to a server that runs only meanwhile. Raises RuntimeError where it fails."""
    (answer,) = server.work([[body]]).answers
    if answer.error or not answer.times:
        raise RuntimeError(f"{server.label}: {answer.error or 'no text'}")
    return answer


def _computed(answer: Answer) -> int:
    """Tokens of the prompt that the server did not have."""
    cached = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return int(answer.usage["prompt_tokens"] - cached)
