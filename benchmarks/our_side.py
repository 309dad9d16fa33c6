"""Our side of the comparison: one process that holds a random model and measures on request.

Started by vs_llama.py; the requests are those of llama_side.py, except that "load" comes with the
model's shape, and {"do": "bandwidth"}. --tiny answers one of each and ends.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from dry_run import add_tiny
from processes import memory, rehearse, serve

from nomatmul.engine import random_model, read_bandwidth
from nomatmul.evaluate.speed import bytes_read_per_token, prefill_seconds, step_seconds
from nomatmul.formats.config import ModelConfig

BATCH_STEPS = 8


class Ours:
    """One set of weights behind engines of one or more threads."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.lm: Any = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        config = ModelConfig(**request["shape"])
        self.lm = random_model(config, request["packing"], "int8", isa=request["isa"])
        return {
            "seconds": time.perf_counter() - start,
            "isa": self.lm.backend.isa,
            "embedding": self.lm.embedding_form,
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

    def _with(self, threads: int) -> Any:
        if threads not in self.models:
            self.models[threads] = self.lm.with_threads(threads)
        return self.models[threads]


def bandwidth(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes/s at which so many threads read so much memory in huge pages."""
    return {"bytes_per_second": 1e9 * read_bandwidth(request["gib"], request["threads"])}


TINY = {"vocab_size": 256, "hidden_size": 128, "num_layers": 1, "intermediate_size": 256}
REQUESTS = [
    {"do": "load", "shape": TINY, "packing": "2bit", "isa": None},
    {"do": "bandwidth", "threads": 1, "gib": 0.01},
    *({"do": what, "threads": 1, "count": 2} for what in ("decode", "batch", "prefill")),
    {"do": "memory"},
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
        "bandwidth": bandwidth,
        "memory": lambda request: memory(),
    }
    if options.tiny:
        rehearse(handlers, REQUESTS)
    else:
        serve(handlers)


if __name__ == "__main__":
    main()
