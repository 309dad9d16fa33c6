"""One side of the Pareto measurement: a process that holds copies of one model in one form.

Started by pareto.py. Requests: {"do": "load", "engine": "nomatmul" | "llama.cpp", "shape", "forms",
"path"} loads the first copy; {"do": "more", "copies"} loads others until there are so many;
{"do": "fill", "count", "more"} gives each a sequence of that many tokens; {"do": "steps",
"context", "count", "rotate"} times single tokens behind the first `context` of them, by the first
copy or by all in turn; {"do": "prefill", "count"}; {"do": "memory"}. One thread; seconds are of CPU
time, so that whoever else uses the core costs cache but no time. --tiny answers one of each and
ends.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Protocol

from dry_run import add_tiny
from llama_side import Llama
from processes import memory, rehearse, serve

from nomatmul.engine import random_model
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig

PIECE = 64  # tokens of a prompt that are taken at once: both sides keep buffers for so many


class Copy(Protocol):
    """One model with one sequence."""

    def fill(self, count: int) -> None: ...
    def go_back(self, context: int) -> None: ...
    def step(self, position: int) -> float: ...
    def prefill(self, count: int) -> float: ...


class Ours:
    """A copy behind our engine. State that each token overwrites is forked, not rolled back."""

    def __init__(self, request: dict[str, Any]) -> None:
        config = ModelConfig(**request["shape"])
        self.lm = random_model(config, threads=1, **request["forms"])
        self.about = {**self.lm.footprint(), "isa": self.lm.backend.isa}

    def fill(self, count: int) -> None:
        self.filled = self.lm.session()
        for first in range(0, count, PIECE):
            ids = [self._id(n) for n in range(first, min(count, first + PIECE))]
            self.filled.append(ids, logits="none")

    def go_back(self, context: int) -> None:
        self.running = self.filled.fork()
        if "kv_token" in self.about:
            self.running.roll_back(context)

    def step(self, position: int) -> float:
        ids = [self._id(position)]
        start = time.process_time()
        self.running.append(ids)
        return time.process_time() - start

    def prefill(self, count: int) -> float:
        session, ids = self.lm.session(), [self._id(n) for n in range(count)]
        start = time.process_time()
        session.append(ids)
        return time.process_time() - start

    def _id(self, number: int) -> int:
        return (7919 * number) % self.lm.config.vocab_size


class Theirs:
    """A copy behind llama.cpp."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.llama = Llama()
        self.llama.clock = time.process_time
        self.about = self.llama.load(request)

    def fill(self, count: int) -> None:
        self.llama.fill({"count": count, "threads": 1, "batch": PIECE})

    def go_back(self, context: int) -> None:
        self.llama.roll_back(context)

    def step(self, position: int) -> float:
        return self.llama.step(position)

    def prefill(self, count: int) -> float:
        return count / self.llama.prefill({"count": count, "threads": 1})["tokens_per_second"]


class Copies:
    """Answers the requests."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}
        self.copies: list[Copy] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        self.request = request
        native()
        before = memory()["resident"]
        self.more({"copies": 1})
        return {"resident_before": before, "about": self.copies[0].about}

    def more(self, request: dict[str, Any]) -> dict[str, Any]:
        make = Ours if self.request["engine"] == "nomatmul" else Theirs
        while len(self.copies) < request["copies"]:
            self.copies.append(make(self.request))
        return {}

    def fill(self, request: dict[str, Any]) -> dict[str, Any]:
        for copy in self.copies:
            copy.fill(request["count"])
        return {}

    def steps(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each of `count` steps; the first copy's first two warm it and do not count."""
        context, count = request["context"], request["count"]
        copies = self.copies if request["rotate"] else self.copies[:1]
        for copy in copies:
            copy.go_back(context)
        warm = 0 if request["rotate"] else 2
        times = []
        for number in range(count + warm):
            turn, place = divmod(number, len(copies))
            times.append(copies[place].step(context + turn))
        return {"seconds": times[warm:]}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": self.copies[0].prefill(request["count"])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_tiny(parser)
    options = parser.parse_args(argv)
    copies = Copies()
    handlers = {
        "load": copies.load,
        "more": copies.more,
        "fill": copies.fill,
        "steps": copies.steps,
        "prefill": copies.prefill,
        "memory": lambda request: memory(),
    }
    if not options.tiny:
        serve(handlers)
        return
    shape = {"vocab_size": 256, "hidden_size": 128, "num_layers": 1, "intermediate_size": 256}
    rehearse(
        handlers,
        [
            {"do": "load", "engine": "nomatmul", "shape": shape, "forms": {"packing": "2bit"}},
            {"do": "more", "copies": 2},
            {"do": "fill", "count": 4},
            {"do": "steps", "context": 2, "count": 2, "rotate": False},
            {"do": "steps", "context": 2, "count": 2, "rotate": True},
            {"do": "prefill", "count": 4},
            {"do": "memory"},
        ],
    )


if __name__ == "__main__":
    main()
