"""llama.cpp's side of the comparison: one process that loads a GGUF and measures on request.

Started by vs_llama.py; reads one JSON request a line from stdin, answers one JSON line.
--tiny answers one of each and ends, or says that llama-cpp-python is missing.
Requests: {"do": "load", "path": ...}, {"do": "decode" | "prefill" | "batch", "threads": ...,
"count": steps | tokens | sequences}, {"do": "memory"}. {"do": "fill", "threads": ..., "count":
tokens} begins a long sequence ("batch": tokens taken at once), and {"do": "long", "threads",
"count", "context": tokens} goes back to that many of its tokens and decodes from there.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from dry_run import add_tiny
from processes import memory, rehearse, serve

if importlib.util.find_spec("llama_cpp"):
    import llama_cpp

DECODE_CONTEXT = 256  # their key-value cache is kept small: it counts in their memory, not in ours
BATCH_STEPS = 8
FILL = 512  # tokens of a prompt that are taken at once


class Llama:
    """One loaded model and one context, through the C interface (no Python in the timed loop)."""

    clock = staticmethod(time.perf_counter)  # of steps and prompts

    def __init__(self) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.model: Any = None
        self.context: Any = None
        self.kind: tuple[int, int, int] | None = None
        self.vocab_size = 0
        self.rng = np.random.default_rng(0)

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        params = llama_cpp.llama_model_default_params()
        # Read into memory, which then can lie in huge pages; a mapped file cannot. (Setting a
        # field that the structure lacks would be silent: ctypes accepts any attribute.)
        if any(name == "load_mode" for name, *_ in params._fields_):
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        else:
            params.use_mmap = False
        start = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(request["path"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {request['path']}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        return {
            "seconds": time.perf_counter() - start,
            "system": llama_cpp.llama_print_system_info().decode(),
            "version": llama_cpp.__version__,
        }

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of `count` single-token steps, the median step."""
        self._use_context(DECODE_CONTEXT, 1, request["threads"])
        return {"tokens_per_second": 1 / self._median_step(1, request["count"])}

    def batch(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s over all of `count` sequences that decode together."""
        size = request["count"]
        self._use_context(DECODE_CONTEXT // 4 * size, size, request["threads"])
        return {"tokens_per_second": size / self._median_step(size, BATCH_STEPS)}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of one prompt of `count` tokens; only the last token's logits are computed."""
        count = request["count"]
        self._use_context(count + 64, 1, request["threads"], batch=count)
        return {"tokens_per_second": count / self._run([0] * count, range(count))}

    def fill(self, request: dict[str, Any]) -> dict[str, Any]:
        """A sequence of `count` tokens whose keys and values stay."""
        count = request["count"]
        batch = min(request.get("batch", FILL), count)
        self._use_context(count + 64, 1, request["threads"], batch=batch)
        for first in range(0, count, batch):
            positions = range(first, min(count, first + batch))
            self._run([0] * len(positions), positions)
        return {}

    def long(self, request: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of `count` steps behind the first `context` tokens of the filled sequence."""
        first = request["context"]
        llama_cpp.llama_set_n_threads(self.context, request["threads"], request["threads"])
        self.roll_back(first)
        return {"tokens_per_second": 1 / self._median_step(1, request["count"], first)}

    def roll_back(self, position: int) -> None:
        """Forget what the filled sequence has from this position on."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, position, -1)

    def step(self, position: int) -> float:
        """Decode one random token of the filled sequence; returns seconds."""
        return self._run([0], [position])

    def _use_context(self, length: int, sequences: int, threads: int, batch: int = 64) -> None:
        if self.kind != (length, sequences, batch):
            if self.context is not None:
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = length, sequences
            params.n_batch = params.n_ubatch = batch
            self.context = llama_cpp.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp cannot make a context of {length} tokens")
            self.kind = (length, sequences, batch)
        llama_cpp.llama_set_n_threads(self.context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _median_step(self, sequences: int, count: int, first: int = 0) -> float:
        times = [
            self._run(range(sequences), [position] * sequences)
            for position in range(first, first + count + 2)
        ]
        return float(np.median(times[2:]))  # the first two warm caches and threads

    def _run(self, sequences: Any, positions: Any) -> float:
        """Decode one batch of tokens given by (sequence, position); returns seconds."""
        batch = llama_cpp.llama_batch_init(len(positions), 0, 1)
        batch.n_tokens = len(positions)
        single = len(set(sequences)) == 1
        for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            batch.token[i] = int(self.rng.integers(0, self.vocab_size))
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not single or i == len(positions) - 1
        start = self.clock()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = self.clock() - start
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return seconds


def missing() -> list[str]:
    """The packages of the extra `bench` that are not installed here and that this side needs."""
    return [name for name in ("llama_cpp", "gguf") if not importlib.util.find_spec(name)]


def dry_run(handlers: dict[str, Any]) -> None:
    from llama_gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        shape = {"vocab_size": 256, "hidden_size": 256, "num_layers": 1, "intermediate_size": 256}
        write_gguf(path, form="TQ2_0", shape=shape, head="Q4_0")
        asked = [
            {"do": what, "threads": 1, "count": 2, "context": 1}
            for what in ("decode", "batch", "prefill", "fill", "long")
        ]
        rehearse(handlers, [{"do": "load", "path": str(path)}, *asked, {"do": "memory"}])


def side_options(argv: list[str] | None, about: str | None) -> argparse.Namespace | None:
    """Options of a side that needs llama.cpp; None for a dry run that is left out without it."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_tiny(parser)
    options = parser.parse_args(argv)
    if names := missing():
        words = f"{' and '.join(names)} not installed: pip install 'nomatmul[bench]'"
        if not options.tiny:
            parser.error(words)
        print(f"left out: {words}")
        return None
    return options


def main(argv: list[str] | None = None) -> None:
    options = side_options(argv, __doc__)
    if options is None:
        return
    llama = Llama()
    handlers = {
        "load": llama.load,
        "decode": llama.decode,
        "batch": llama.batch,
        "prefill": llama.prefill,
        "fill": llama.fill,
        "long": llama.long,
        "memory": lambda request: memory(),
    }
    if options.tiny:
        dry_run(handlers)
    else:
        serve(handlers)


if __name__ == "__main__":
    main()
