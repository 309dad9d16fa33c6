"""Our side of the comparison: one process that holds a random model and measures on request.

Started by vs_llama.py; the requests are those of llama_side.py, and {"do": "bandwidth"}.
"""

from __future__ import annotations

import time
from typing import Any

from processes import memory, serve

from nomatmul.engine import read_bandwidth
from nomatmul.evaluate.speed import (
    SpeedRequest,
    bytes_read_per_token,
    median,
    open_model,
    prefill_seconds,
    step_seconds,
    with_threads,
)

BATCH_STEPS = 8


class Ours:
    """One set of weights behind engines of one or more threads."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.lm: Any = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.lm = open_model(
            SpeedRequest(
                size=request["size"], threads=(), packing=request["packing"], isa=request["isa"]
            )
        )
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
            self.models[threads] = with_threads(self.lm, threads)
        return self.models[threads]


def bandwidth(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes/s at which so many threads read 1 GiB of huge pages."""
    return {"bytes_per_second": 1e9 * read_bandwidth(1.0, request["threads"])}


if __name__ == "__main__":
    ours = Ours()
    serve(
        {
            "load": ours.load,
            "decode": ours.decode,
            "batch": ours.batch,
            "prefill": ours.prefill,
            "bandwidth": bandwidth,
            "memory": lambda request: memory(),
        }
    )
