"""Our side of the comparison: one process that holds a random model and measures on request.

Started by vs_llama.py; the requests are those of llama_side.py, except that "load" comes with the
model's shape, and {"do": "bandwidth"}. For serve_load.py: {"do": "open", "path", "threads"} loads a
packed directory; {"do": "generate", "ids", "count", "ban"} times an answer and returns its ids;
{"do": "behind", "history", "new"} times new ids behind others, and reading the state of those from
a file. --tiny answers one of each and ends.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from dry_run import add_tiny
from processes import memory, rehearse, serve

from nomatmul.engine import load, random_model, read_bandwidth
from nomatmul.engine.sampling import Sampling
from nomatmul.engine.session import Session
from nomatmul.evaluate.speed import bytes_read_per_token, prefill_seconds, step_seconds
from nomatmul.formats.config import ModelConfig

BATCH_STEPS = 8


class Ours:
    """One set of weights behind engines of one or more threads."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.lm: Any = None
        self.filled: Any = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        config, packing = ModelConfig(**request["shape"]), request["packing"]
        table = packing if config.embedding_linear == "ternary" else "int8"
        self.lm = random_model(config, packing, table, isa=request["isa"])
        parts = self.lm.footprint()
        return {
            "seconds": time.perf_counter() - start,
            "isa": self.lm.backend.isa,
            "embedding": self.lm.embedding_form,
            "head_form": packing if config.head_kind == "ternary" else table,
            "head_bytes": parts.get("head") or parts["embedding"],
            "packed_bytes_per_token": bytes_read_per_token(self.lm),
        }

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        times = step_seconds(self._with(request["threads"]), request["count"])
        return {"tokens_per_second": 1 / median(times)}

    def batch(self, request: dict[str, Any]) -> dict[str, Any]:
        size = request["count"]
        times = step_seconds(self._with(request["threads"]), BATCH_STEPS, size)
        return {"tokens_per_second": size / median(times)}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        count = request["count"]
        seconds = prefill_seconds(self._with(request["threads"]), count, turns=1)
        return {"tokens_per_second": count / seconds}

    def fill(self, request: dict[str, Any]) -> dict[str, Any]:
        """A sequence of `count` tokens whose keys and values stay."""
        ids = [(7919 * number) % self.lm.config.vocab_size for number in range(request["count"])]
        self.filled = self._with(request["threads"]).session()
        self.filled.append(ids, logits="none")
        return {}

    def long(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of `count` steps behind the first `context` tokens of the filled sequence."""
        model = self._with(request["threads"])
        self.filled.roll_back(request["context"])
        session = Session(model, self.filled._state)  # of the same weights with other threads
        times = []
        for step in range(request["count"] + 2):
            start = time.perf_counter()
            model.step([session], [[(7919 * step) % model.config.vocab_size]])
            times.append(time.perf_counter() - start)
        return {"tokens_per_second": 1 / median(times[2:])}

    def parts(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of the parts of a step, of so many behind `context` tokens, in the mean."""
        model, count = self._with(request["threads"]), request["count"]
        self.filled.roll_back(request["context"])
        seconds: dict[str, float] = {}
        for step in range(count):
            ids = np.array([(7919 * step) % model.config.vocab_size], np.int32)
            model.backend.step([self.filled._state], [ids], "last", seconds=seconds)
        return {"seconds": {part: spent / count for part, spent in seconds.items()}}

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load a packed directory, or the model in the box."""
        self.lm = load(request["path"], kind="language", threads=request["threads"])
        return {"isa": self.lm.backend.isa}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of `lm.generate` of the likeliest tokens, and the ids that it makes."""
        ban = {"logit_bias": dict.fromkeys(request["ban"], -100.0)} if request["ban"] else {}
        count = request["count"]
        start = time.perf_counter()
        # what `generate` does, and then the stream knows its tokens
        stream = self.lm.stream(request["ids"], max_tokens=count, sampling=Sampling(**ban))
        "".join(stream)
        rate = count / (time.perf_counter() - start)
        return {"tokens_per_second": rate, "ids": stream.token_ids}

    def behind(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of new ids behind a history, and of reading the history's state from a file."""
        session = self.lm.session()
        session.append(request["history"], logits="none")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            session.save(path)
            start = time.perf_counter()
            session = self.lm.session(path)
            read = time.perf_counter() - start
        start = time.perf_counter()
        session.append(request["new"])
        return {"seconds": time.perf_counter() - start, "read": read}

    def _with(self, threads: int) -> Any:
        if threads == self.lm.backend.threads:
            return self.lm
        if threads not in self.models:
            self.models[threads] = self.lm.with_threads(threads)
        return self.models[threads]


def bandwidth(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes/s at which so many threads read so much memory in huge pages."""
    return {"bytes_per_second": 1e9 * read_bandwidth(request["gib"], request["threads"])}


TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_layers": 1,
    "intermediate_size": 256,
}
REQUESTS = [
    {"do": "load", "shape": TINY, "packing": "2bit", "isa": None},
    {"do": "bandwidth", "threads": 1, "gib": 0.01},
    *({"do": what, "threads": 1, "count": 2} for what in ("decode", "batch", "prefill")),
    {"do": "fill", "threads": 1, "count": 2},
    {"do": "long", "threads": 1, "count": 2, "context": 0},
    {"do": "parts", "threads": 1, "count": 2, "context": 0},
    {"do": "memory"},
    {"do": "open", "path": None, "threads": 1},
    {"do": "generate", "ids": [5], "count": 2, "ban": []},
    {"do": "behind", "history": [5, 6], "new": [7]},
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_tiny(parser)
    options = parser.parse_args(argv)
    ours = Ours()
    handlers = {
        "load": ours.load,
        "decode": ours.decode,
        "batch": ours.batch,
        "prefill": ours.prefill,
        "fill": ours.fill,
        "long": ours.long,
        "parts": ours.parts,
        "open": ours.open,
        "generate": ours.generate,
        "behind": ours.behind,
        "bandwidth": bandwidth,
        "memory": lambda request: memory(),
    }
    if options.tiny:
        rehearse(handlers, REQUESTS)
    else:
        serve(handlers)


if __name__ == "__main__":
    main()
