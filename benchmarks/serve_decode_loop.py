"""llama.cpp without its server: a batched llama_decode loop with a server's scheduling.

Started by serve_load.py where it is given no llama-server. Each turn decodes one token of every
stream that runs, and as much of waiting prompts as the batch leaves room for; a client's next
request takes its place at once. There is no HTTP in it, so it is at least as fast as the server.
Requests: {"do": "load", "path"}, {"do": "work", "threads", "clients": [[[token, ...], ...], ...],
"count"}: answers of `count` tokens to each client's prompts; {"do": "memory"}. --tiny answers one
of each and ends, or says that llama-cpp-python is missing.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llama_side import Llama, missing, side_options
from processes import memory, rehearse, serve

if not missing():
    import llama_cpp

BATCH = 512  # tokens a turn, llama-server's --ubatch-size
TINY = {"vocab_size": 512, "hidden_size": 256, "num_layers": 1, "intermediate_size": 256}


@dataclass
class Stream:
    """A client: its prompts, and how far the present one is. rest: ids to decode next."""

    prompts: list[list[int]]
    rest: list[int] = field(default_factory=list)
    position: int = 0
    made: int = 0
    start: float = 0.0
    times: list[float] = field(default_factory=list)


class Loop(Llama):
    """All streams in one context, a sequence each."""

    def work(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds in all, and of each answer its start and the time of every token."""
        streams = [Stream(list(prompts)) for prompts in request["clients"]]
        longest = max(len(prompt) for stream in streams for prompt in stream.prompts)
        length = -(-(longest + request["count"]) // 64) * 64
        self._use_context(length * len(streams), len(streams), request["threads"], batch=BATCH)
        answers: list[dict[str, Any]] = []
        start = time.perf_counter()
        while sum(self._begin(number, stream) for number, stream in enumerate(streams)):
            for number in self._turn(streams):
                stream = streams[number]
                if stream.made == request["count"]:
                    answers.append({"start": stream.start, "times": stream.times})
                    stream.rest = []
        return {"seconds": time.perf_counter() - start, "answers": answers}

    def _begin(self, number: int, stream: Stream) -> bool:
        """Whether the stream has work; takes the client's next prompt where one has ended."""
        if not stream.rest and stream.prompts:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), number, -1, -1)
            stream.rest, stream.position, stream.made = list(stream.prompts.pop(0)), 0, 0
            stream.start, stream.times = time.perf_counter(), []
        return bool(stream.rest)

    def _turn(self, streams: list[Stream]) -> list[int]:
        """One llama_decode; returns the streams that made a token."""
        batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        at, made, rows = 0, [], []
        waiting = [number for number, stream in enumerate(streams) if stream.rest]
        for number in sorted(waiting, key=lambda number: len(streams[number].rest)):
            stream = streams[number]
            chunk = stream.rest[: BATCH - at]
            for token in chunk:
                batch.token[at], batch.pos[at], batch.logits[at] = token, stream.position, False
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, number
                stream.position, at = stream.position + 1, at + 1
            stream.rest = stream.rest[len(chunk) :]
            if chunk and not stream.rest:
                batch.logits[at - 1] = True
                made.append(number)
                rows.append(at - 1)
        batch.n_tokens = at
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        for number, row in zip(made, rows, strict=True):
            logits = llama_cpp.llama_get_logits_ith(self.context, row)
            values_V = np.ctypeslib.as_array(logits, (self.vocab_size,))
            stream = streams[number]
            stream.rest, stream.made = [int(values_V.argmax())], stream.made + 1
            stream.times.append(time.perf_counter())
        return made


def main(argv: list[str] | None = None) -> None:
    options = side_options(argv, __doc__)
    if options is None:
        return
    loop = Loop()
    handlers = {"load": loop.load, "work": loop.work, "memory": lambda request: memory()}
    if not options.tiny:
        serve(handlers)
        return
    from llama_gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_gguf(path, form="TQ2_0", shape=TINY)
        work = {"do": "work", "threads": 1, "clients": [[[1, 2], [3]], [[4]]], "count": 2}
        rehearse(handlers, [{"do": "load", "path": str(path)}, work, {"do": "memory"}])


if __name__ == "__main__":
    main()
