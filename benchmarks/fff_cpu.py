"""One conditional feed-forward layer on a CPU against every dense layer of the same neurons.

Everything in one process: for each shape, batch and number of threads the contenders take turns,
round after round; a figure is the median of all its calls. Weights rotate through 16 layers and
inputs are random and distinct, as in a model; rows lie in 2 MiB pages, as the engine keeps them.

    python benchmarks/fff_cpu.py                  # all, about 5 minutes; writes benchmarks/results
    python benchmarks/fff_cpu.py --quick --out /tmp/x   # a look: one shape, two batches
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fff_cpu_page
import numpy as np
import report
import torch
from dry_run import add_tiny, shrink, temporary
from numpy.typing import NDArray
from torch import nn

from nomatmul import _native
from nomatmul.formats.packing import row_bytes
from nomatmul.ops.fff import fff

HIDDEN = 768
LAYERS = 16
SHAPES = {"1x11": (1, 11), "16x6": (16, 6), "128x3": (128, 3)}  # trees, depth
TINY_SHAPES = {"2x2": (2, 2)}
BATCHES = (1, 16, 128, 16384)
FORMS = ("f32", "bf16", "int8", "ternary")
# A dense layer's time a token is flat from here on; larger batches are measured at this size.
DENSE_LIMIT = 2048

# A contender whose call takes so many seconds is called once.
SLOW_CALL = 1.5

Seconds = list[float]
Contender = Callable[[float], Seconds]  # runs for about so many seconds, at least one call


def neurons(trees: int, depth: int) -> int:
    """Rows of all trees."""
    return trees * (2 ** (depth + 1) - 1)


def arena(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return uninitialised memory in huge pages."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    view = np.asarray(_native.Arena(count).view())
    return view[:count].view(dtype).reshape(shape)


def random_rows(form: str, count: int, seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return random rows of one layer and what goes with them."""
    rng = np.random.default_rng(seed)
    if form == "ternary":
        rows = arena((count, 2, row_bytes(HIDDEN, "2bit")), np.uint8)
        _native.random_codes("2bit", rows.reshape(2 * count, -1), HIDDEN, seed)
        norms = {"norm_in": np.ones(HIDDEN, np.float32), "norm_out": np.ones(count, np.float32)}
        return rows, {"scales": np.full(2, 0.03, np.float32), **norms}
    if form == "int8":
        rows = arena((count, 2, HIDDEN), np.int8)
        rows[:] = rng.integers(-127, 128, rows.shape, np.int8)
        return rows, {"scales": np.full((count, 2), 5e-4, np.float32)}
    values = rng.standard_normal((count, 2, HIDDEN), np.float32)
    values *= np.float32(HIDDEN**-0.5)
    rows = arena(values.shape, np.float32 if form == "f32" else np.uint16)
    rows[:] = values if form == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    return rows, {}


def repeats(once: float, seconds: float) -> int:
    """Calls that fill the time, at least one."""
    return max(1, int(seconds / max(once, 1e-7)))


def conditional(layers: list[Any], x_RND: NDArray[np.float32]) -> Contender:
    """The native layer, called by the native core's own clock: no Python in between."""
    once = statistics.median(_native.fff.time_forward(layers, x_RND, 3))
    return lambda seconds: list(_native.fff.time_forward(layers, x_RND, repeats(once, seconds)))


def from_python(layers: list[Any], x_RND: NDArray[np.float32]) -> Contender:
    """The same layer called from Python."""
    y_ND = np.empty_like(x_RND[0])

    def run(seconds: float) -> Seconds:
        found: Seconds = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            i = len(found)
            start = time.perf_counter()
            layers[i % LAYERS].forward(x_RND[i % len(x_RND)], y_ND)
            found.append(time.perf_counter() - start)
        return found

    return run


def dense_torch(models: list[nn.Module], x_RND: torch.Tensor, factor: float) -> Contender:
    """A dense layer of torch."""

    def run(seconds: float) -> Seconds:
        found: Seconds = []
        end = time.perf_counter() + seconds
        with torch.inference_mode():
            while not found or time.perf_counter() < end:
                i = len(found)
                start = time.perf_counter()
                models[i % LAYERS](x_RND[i % len(x_RND)])
                found.append((time.perf_counter() - start) * factor)
        return found

    return run


def dense_ternary(
    packed: list[NDArray[np.uint8]], tokens: int, threads: int, factor: float
) -> Contender:
    """Our own dense ternary layer: its two products alone (no norms, quantisers, activation)."""
    rng = np.random.default_rng(3)
    kernels = _native.kernels
    isa = kernels.best()
    sizes = (HIDDEN, packed[0].shape[1])
    qs = [rng.integers(-127, 128, (tokens, size), np.int8) for size in sizes]

    def run(seconds: float) -> Seconds:
        sides = []
        for w, q in zip(packed, qs, strict=True):
            once = kernels.time_product(isa, "2bit", w, q, threads, 1)[0]
            count = repeats(once, seconds / 2)
            sides.append(statistics.median(kernels.time_product(isa, "2bit", w, q, threads, count)))
        return [sum(sides) * factor]

    return run


def dense_models(count: int) -> dict[str, list[nn.Module]]:
    """Return 16 dense layers of `count` neurons in each form that torch has."""
    plain = [
        nn.Sequential(nn.Linear(HIDDEN, count), nn.GELU(), nn.Linear(count, HIDDEN))
        for _ in range(LAYERS)
    ]
    quantise = torch.ao.quantization.quantize_dynamic
    small = [quantise(model, {nn.Linear}, dtype=torch.qint8) for model in plain]
    halves = [
        nn.Sequential(nn.Linear(HIDDEN, count), nn.GELU(), nn.Linear(count, HIDDEN)).bfloat16()
        for _ in range(LAYERS)
    ]
    return {"torch fp32": plain, "torch bf16": halves, "torch int8": small}


def dense_packed(count: int) -> list[NDArray[np.uint8]]:
    """Return 16 dense ternary layers: input products [16, N, bytes], output products."""
    sides = []
    for n, k in ((count, HIDDEN), (HIDDEN, count)):
        rows = arena((LAYERS, n, row_bytes(k, "2bit")), np.uint8)
        _native.random_codes("2bit", rows.reshape(LAYERS * n, -1), k, 1)
        sides.append(rows)
    return sides


def take_turns(
    contenders: dict[str, Contender], rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Return each contender's median, and the quartiles, in seconds a call."""
    found: dict[str, Seconds] = {name: [] for name in contenders}
    slow: set[str] = set()
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            if name in slow:
                continue
            times = contender(seconds)
            if times[0] > SLOW_CALL:  # one call must do, the warm-up
                slow.add(name)
            if turn > 0 or name in slow:  # the first round warms up
                found[name] += times
    return {name: _summary(times) for name, times in found.items()}


def _summary(times: Seconds) -> dict[str, float]:
    quarter = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    middle = statistics.median(times)
    return {"median": middle, "low": quarter[0], "high": quarter[2], "calls": len(times)}


def measure_shape(
    name: str, trees: int, depth: int, batches: tuple[int, ...], options: Any
) -> list[dict[str, Any]]:
    """Measure one shape of trees with all batches and threads."""
    count = neurons(trees, depth)
    weights = {form: [random_rows(form, count, seed) for seed in range(LAYERS)] for form in FORMS}
    models, packed = dense_models(count), dense_packed(count)
    cells = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        layers = {
            form: [
                _native.fff.Layer(form, rows, trees, depth, _act(form), threads=threads, **extra)
                for rows, extra in sides
            ]
            for form, sides in weights.items()
        }
        for batch in batches:
            cell = _measure_cell(layers, models, packed, batch, threads, options)
            cells.append({"shape": name, "batch": batch, "threads": threads, "seconds": cell})
            print(name, batch, threads, fff_cpu_page.line(cell, batch), flush=True)
    return cells


def _act(form: str) -> str:
    return "silu" if form == "ternary" else "gelu"


def _measure_cell(
    layers: dict[str, list[Any]],
    models: dict[str, list[nn.Module]],
    packed: list[NDArray[np.uint8]],
    batch: int,
    threads: int,
    options: Any,
) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(batch)
    inputs = max(2, min(512, 8192 // batch))
    x_RND = rng.standard_normal((inputs, batch, HIDDEN), np.float32)
    tokens = min(batch, DENSE_LIMIT)
    factor = batch / tokens
    x_torch = torch.from_numpy(x_RND[:, :tokens].copy())
    contenders = {f"fff {form}": conditional(made, x_RND) for form, made in layers.items()}
    if batch == 1:
        contenders["fff int8, from Python"] = from_python(layers["int8"], x_RND)
    for name, made in models.items():
        x = x_torch.bfloat16() if name == "torch bf16" else x_torch
        contenders[name] = dense_torch(made, x, factor)
    contenders["dense ternary"] = dense_ternary(packed, tokens, threads, factor)
    large = batch > DENSE_LIMIT
    return take_turns(contenders, 2 if large else options.rounds, 0 if large else options.seconds)


def measure_training(trees: int, depth: int, batch: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of one layer: masked dense against conditional."""
    count = neurons(trees, depth)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    x = torch.randn(batch, HIDDEN, requires_grad=True)
    w_in = (torch.randn(count, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    w_out = (torch.randn(count, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    bias = torch.zeros(count, requires_grad=True)
    gradient = torch.randn(batch, HIDDEN)

    def step(implementation: str) -> float:
        for leaf in (x, w_in, w_out, bias):
            leaf.grad = None
        start = time.perf_counter()
        y, _, _ = fff(x, w_in, w_out, bias, trees=trees, depth=depth, implementation=implementation)
        y.backward(gradient)
        return time.perf_counter() - start

    times: dict[str, Seconds] = {"masked": [], "native": []}
    for turn in range(rounds + 1):
        for name, calls in (("masked", 1), ("native", 5)):
            found = [step(name) for _ in range(calls)]
            times[name] += found if turn > 0 else []
    return {name: _summary(found) for name, found in times.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--name", default="", help="of the machine, in the file's name")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.04, help="of a contender a round")
    parser.add_argument("--quick", action="store_true", help="one shape, two batches, no training")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, threads=[1], rounds=1, seconds=0.0)
        options.out = options.out or temporary()
    options.out = options.out or Path(__file__).parent / "results"
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write JSON and Markdown."""
    options = parse(argv)
    start = time.time()
    machine = report.machine(options.name)
    machine |= {"isa": _native.kernels.best(), "torch": torch.__version__}
    known = TINY_SHAPES if options.tiny else SHAPES
    shapes = list(known)[:1] if options.quick else list(known)
    batches = (1, 4) if options.tiny else BATCHES[::2] if options.quick else BATCHES
    cells = [
        cell for name in shapes for cell in measure_shape(name, *known[name], batches, options)
    ]
    training = None
    if options.tiny:
        training = measure_training(2, 2, 16, 1)
    elif not options.quick:
        training = measure_training(*SHAPES["1x11"], 4096, 3)
    promises = {
        name: neurons(trees, depth) / (trees * (depth + 1))
        for name, (trees, depth) in known.items()
    }
    document = {
        "machine": machine,
        "minutes": (time.time() - start) / 60,
        "promises": promises,
        "cells": cells,
        "training": training,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{machine['date']}-fff-cpu-{machine['name']}"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(fff_cpu_page.markdown(document))
    print(f"{stem}.md, {document['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
