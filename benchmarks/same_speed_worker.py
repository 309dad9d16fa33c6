"""One side of `same_speed.py`: prints its rows, then seconds of those asked for. A library.

It uses names of the package and of `bert_cpu.py` only that the tree before has, too.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Calls = dict[str, Callable[[], Any]]


def main() -> None:
    kind, threads, tiny = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
    calls = {"decoder": decoders, "encoder": encoders, "trees": trees}[kind](threads, tiny)
    for call in calls.values():
        call()
    print(json.dumps(list(calls)), flush=True)
    clock = time.thread_time if threads == 1 else time.perf_counter
    for line in sys.stdin:
        start = clock()
        calls[line.strip()]()
        print(clock() - start, flush=True)


def decoders(threads: int, tiny: bool) -> Calls:
    from nomatmul.engine import random_model
    from nomatmul.formats.config import ModelConfig

    glu = ModelConfig(vocab_size=16000, hidden_size=1024, num_layers=12, intermediate_size=2816)
    union = ModelConfig(
        vocab_size=16000, hidden_size=768, num_layers=8, channel_mixer="fff", activation="silu",
        fff_trees=4, fff_depth=8,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 16000, 256).astype(np.int32)
    calls: Calls = {}
    for name, config, packing in (
        ("GLU 2bit", glu, "2bit"), ("GLU 1.6bit", glu, "1.6bit"), ("union", union, "2bit")
    ):  # fmt: skip
        lm = random_model(config, packing, "int8", threads=threads)

        def decode(lm: Any = lm) -> None:
            session = lm.session()
            for n in range(12):
                session.append(ids[n : n + 1])

        calls[f"{name} decode 12"] = decode
        for tokens in (2, 4, 8, 16, 32, 64, 256):
            calls[f"{name} prefill {tokens}"] = lambda lm=lm, n=tokens: lm.session().append(ids[:n])
    return calls


def encoders(threads: int, tiny: bool) -> Calls:
    import bert_cpu

    bert_cpu.SIZES["num_layers"] = 6
    more = [False] * (len(inspect.signature(bert_cpu.our_model).parameters) - 3)
    calls: Calls = {}
    for name, what in bert_cpu.OURS.items():
        model: Any = bert_cpu.our_model(*what, threads, *more)
        for batch in (1, 8):
            ids = np.random.default_rng(1).integers(0, 30522, (batch, 128))
            calls[f"{name} batch {batch}"] = lambda m=model, ids=ids: m.hidden(ids)
    return calls


def trees(threads: int, tiny: bool) -> Calls:
    from nomatmul.engine.fff import FFFLayer, pack_rows

    rng = np.random.default_rng(0)
    size, copies = (32, 1) if tiny else (768, 4)  # copies in rotation, so that rows leave the cache
    calls: Calls = {}
    for count, depth in ((2, 2),) if tiny else ((1, 11), (16, 6), (128, 3)):
        rows = count * (2 ** (depth + 1) - 1)
        for form in ("f32", "bf16", "int8", "ternary"):
            layers = []
            for _ in range(copies):
                w = rng.standard_normal((2, rows, size), np.float32) * 0.05
                packed, scales = pack_rows(w[0], w[1], form)
                norms = {}
                if form == "ternary":
                    norms = {"norm_in": np.ones(size), "norm_out": np.ones(rows)}
                layers.append(FFFLayer(form, packed, count, depth, "silu", scales=scales,
                                       threads=threads, **norms))  # fmt: skip
            for batch in (1, 128):
                x = rng.standard_normal((batch, size), np.float32)
                times = 16 if batch == 1 else 1

                def run(layers: Any = layers, x: Any = x, times: int = times) -> None:
                    for _ in range(times):
                        for layer in layers:
                            layer(x)

                calls[f"trees {count}x{depth} {form} batch {batch}"] = run
    return calls
