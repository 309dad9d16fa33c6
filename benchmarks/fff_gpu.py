"""FFF layers on a GPU against dense layers and the masked form: time and memory, in CUDA graphs.

    PYTHONPATH=src python benchmarks/fff_gpu.py --out benchmarks/results/DATE-gpu

A layer 768 -> nodes -> 768 in bf16, forward alone and forward with backward (gradients of input
and both weights), one CUDA graph of 16 layers with weights of their own, so that no layer finds its
weights in cache; microseconds a layer, the median of many replays. Peers: the dense layer
768 -> 4096 -> 768 with gelu (two cuBLAS products), the same under torch.compile, and the masked
form of FFF (all nodes, then a mask, as the authors train). Saved bytes: what stays allocated after
the forward pass for the backward one, beside inputs, weights and the output.

Writes fff-gpu.jsonl (one row a figure, as soon as it is there) and fff-gpu.md to --out. Kernels are
compiled by helper processes first, so that the whole takes little over a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dry_run import add_tiny, shrink, temporary
from gpu_children import terminated
from gpu_common import describe, environment
from torch import Tensor
from with_parent import with_parent

from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.ops import fff

WIDTH = 768
DENSE = 4096
SHAPES = {"1x11": (1, 11), "16x6": (16, 6), "128x3": (128, 3)}  # trees, depth
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured where. masked_from: the masked form has no smaller batches."""

    device: str = "cuda"
    layers: int = 16
    batches: tuple[int, ...] = (1, 16, 128, 1024, 16384)
    masked_from: int = 128
    trees: str = "triton"  # the implementation of the conditional layers
    helpers: int = 10


TINY = Scale("cpu", layers=2, batches=(1, 4), masked_from=4, trees="masked", helpers=1)


def dense(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in)), w_out)


def tree_layer(shape: str, implementation: str) -> Layer:
    trees, depth = SHAPES[shape]

    def layer(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return fff.fff(x, w_in, w_out, trees=trees, depth=depth, implementation=implementation)[0]

    return layer


def weights(shape: str | None, layers: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """bf16 (w_in, w_out) of each layer."""
    found = []
    for _ in range(layers):
        if shape is None:
            size_in, size_out = (DENSE, WIDTH), (WIDTH, DENSE)
        else:
            trees, depth = SHAPES[shape]
            size_in = size_out = (trees * (2 ** (depth + 1) - 1), WIDTH)
        w_in = torch.randn(size_in, device=device, dtype=torch.bfloat16) * WIDTH**-0.5
        w_out = torch.randn(size_out, device=device, dtype=torch.bfloat16) * 0.1
        found.append((w_in.requires_grad_(), w_out.requires_grad_()))
    return found


def calls(layer: Layer, batch: int, pairs: list, backward: bool) -> list[Callable[[], Any]]:
    """One function a layer, forward or forward and backward."""
    form: Any = {"device": pairs[0][0].device, "dtype": torch.bfloat16}
    x = torch.randn(batch, WIDTH, **form).requires_grad_(backward)
    dy = torch.randn(batch, WIDTH, **form)

    def run(w_in: Tensor, w_out: Tensor) -> Any:
        with torch.set_grad_enabled(backward):
            y = layer(x, w_in, w_out)
        return torch.autograd.grad(y, (x, w_in, w_out), dy) if backward else y

    return [lambda pair=pair: run(*pair) for pair in pairs]


def time_calls(functions: list[Callable[[], Any]]) -> float:
    """Median microseconds of one function, on the CPU."""
    times = []
    for function in functions:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def time_graph(functions: list[Callable[[], Any]], seconds: float = 0.25) -> float:
    """Median microseconds of one function in a graph of all, 10 to 60 replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            functions[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 10 or (len(times) < 60 and time.perf_counter() - began < seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(functions)


def saved_bytes(layer: Layer, batch: int, pair: tuple[Tensor, Tensor]) -> int:
    """Bytes that a forward pass leaves allocated for its backward pass, without its output."""
    device = pair[0].device
    if device.type == "cpu":
        return 0
    x = torch.randn(batch, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x, *pair)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x, *pair)
    return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()


def jobs(
    scale: Scale, seconds_left: Callable[[], float]
) -> Iterator[tuple[str, str | None, Layer]]:
    """(name, shape or None for dense, layer), what matters most first."""
    yield "dense 4096", None, dense
    for shape in SHAPES:
        yield f"FFF {shape}", shape, tree_layer(shape, scale.trees)
    yield "masked 1x11", "1x11", tree_layer("1x11", "masked")
    if seconds_left() > 15 and scale.device == "cuda":
        yield "dense 4096, compiled", None, torch.compile(dense, dynamic=False)
    for shape in ("16x6", "128x3"):
        yield f"masked {shape}", shape, tree_layer(shape, "masked")


def measure(path: Path, about: dict[str, Any], scale: Scale, seconds: float) -> None:
    began = time.perf_counter()

    def left() -> float:
        return seconds - (time.perf_counter() - began)

    for name, shape, layer in jobs(scale, left):
        pairs = weights(shape, scale.layers, scale.device)
        for backward in (False, True):
            for batch in scale.batches:
                if left() < 3 or (name.startswith("masked") and batch < scale.masked_from):
                    continue
                count = scale.layers if batch < 16384 or not name.startswith("masked") else 4
                clock = time_graph if scale.device == "cuda" else time_calls
                us = clock(calls(layer, batch, pairs[:count], backward))
                row = {"layer": name, "batch": batch, "backward": backward, "us": round(us, 2)}
                if backward:
                    row["saved_bytes"] = saved_bytes(layer, batch, pairs[0])
                append_row(path, {**row, "commit": about["commit"], "device": about["device"]})
                print(f"{name}, batch {batch}, backward {backward}: {us:.1f} us", flush=True)
        torch.cuda.empty_cache()


def warm(part: int, scale: Scale) -> None:
    """Compile what one helper process is given: kernels land in the caches on disk."""
    work = [
        (batch, backward, shape, layer)
        for name, shape, layer in jobs(scale, lambda: 1e9)
        for batch in scale.batches
        for backward in (False, True)
        if not name.startswith("masked") and name != "dense 4096"
    ]
    for index, (batch, backward, shape, layer) in enumerate(work):
        if index % scale.helpers == part:
            calls(layer, batch, weights(shape, 1, scale.device), backward)[0]()
    if scale.device == "cuda":
        torch.cuda.synchronize()


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["layer"] for row in rows))
    lines = ["# FFF layers on a GPU", "", describe(about), ""]
    lines += ["[How it was measured](../README.md#fff-layers-on-a-gpu-fff_gpupy)"]
    for backward, title in ((False, "Forward"), (True, "Forward and backward")):
        found = {(r["layer"], r["batch"]): r for r in rows if r["backward"] == backward}
        body = []
        for name in names:
            cells = [name]
            for batch in batches:
                row, base = found.get((name, batch)), found.get(("dense 4096", batch))
                ratio = f" ({base['us'] / row['us']:.2f})" if row and base else ""
                cells.append(f"{row['us']:.1f}{ratio}" if row else "-")
            body.append(cells)
        lines += ["", f"## {title}", ""]
        lines += table(["layer", *(f"batch {b}" for b in batches)], body)
    lines += ["", "## Bytes kept for the backward pass, batch 16384", ""]
    kept = [r for r in rows if r["batch"] == 16384 and "saved_bytes" in r]
    lines += table(["layer", "MB"], [[r["layer"], f"{r['saved_bytes'] / 1e6:.1f}"] for r in kept])
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=78, help="stop measuring after so long")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--warm", type=int, help="for helper processes: compile this part only")
    parser.add_argument("--table", action="store_true", help="only write the table of the rows")
    add_tiny(parser)
    args = parser.parse_args(argv)
    scale = TINY if args.tiny else Scale()
    if args.tiny:
        shrink(args, parser, seconds=600)
    if args.warm is not None:
        warm(args.warm, scale)
        return 0
    if args.out is None and not args.tiny:
        parser.error("--out is needed")
    args.out = args.out or temporary()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU: torch.cuda.is_available() is False")
    path = args.out / "fff-gpu.jsonl"
    with terminated():
        try:
            if not args.table:
                path.unlink(missing_ok=True)
                measure_all(path, scale, args)
        finally:
            write(args.out, read_rows(path))
    return 0


def measure_all(path: Path, scale: Scale, args: argparse.Namespace) -> None:
    """Compile side by side, then measure."""
    began = time.perf_counter()
    words = [sys.executable, __file__, *(["--tiny"] if args.tiny else []), "--warm"]
    helpers = [
        subprocess.Popen([*words, str(part)], preexec_fn=with_parent())
        for part in range(scale.helpers)
    ]
    for helper in helpers:
        if helper.wait() != 0:
            print("a helper process failed; its kernels are compiled here", file=sys.stderr)
    about = environment(args.commit)
    append_row(path, {"machine": about})
    measure(path, about, scale, args.seconds - (time.perf_counter() - began))


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """fff-gpu.md of the rows that there are; printed, too."""
    about = next((row["machine"] for row in rows if "machine" in row), None)
    if about is None:
        print("no row: the run ended before its first figure", flush=True)
        return
    text = page([row for row in rows if "layer" in row], about)
    (out / "fff-gpu.md").write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
