"""Does it learn? MatMul-free LM and Transformer++ at several sizes on the same tokens.

    python studies/scaling/run.py plan
    python studies/scaling/run.py all --data ../shared/data --work runs/scaling --out runs/out

`all` is prepare (texts to token shards, about half a minute on 32 cores), run and fit, one after
the other, and ends --seconds after its start. Each architecture has the same number of learning
rates to try at each size on a short budget; the best one trains the final runs, one for each seed.
Sizes share layers and width, so their parameter counts differ only by norms and gates' bounds.
Rows go to OUT/scaling-rows.jsonl as they are measured; `fit` makes scaling.json, scaling.md and
the plots of them, `page` the tables of page.md. Rows that lie there already are not measured
again, so that the same command goes on where an earlier one ran out of time; with the same tokens
and seeds the batches are the same, and every row names its commit and kernels.

One process holds one architecture at one size. Two of them train on each GPU at a time, while
others start and compile. With two GPUs the first has MatMul-free models and the second their
twins, so that a run that is cut short is cut alike for both; with one GPU both share it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.documents import HELD_OUT, TRAIN, target, write_missing
from benchmarks.gpu_common import environment, python_path
from benchmarks.with_parent import with_parent
from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows
from studies.compare.arguments import settle, study_parser
from studies.compare.plan import BYTE_PAIRS
from studies.scaling import page
from studies.scaling.plan import CENTRE, SIZES, cells, missing, order, predicted

WORK = "runs/scaling"
LANES = 2  # cells that train at once on a GPU: one computes while the host launches for the other
AHEAD = 2  # further processes that start and compile meanwhile


def prepare(args: argparse.Namespace) -> None:
    """Texts to JSONL (a row a document) to token shards, with the box's tokenizer."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards, read_index
    from nomatmul.train.tokenizer import load_tokenizer

    began = time.monotonic()
    texts, names = args.work / "texts", args.train or TRAIN
    write_missing(args.data, (*names, *HELD_OUT.values()), texts)
    print(f"texts: {time.monotonic() - began:.0f} s", flush=True)
    tokenizer = load_tokenizer(BYTE_PAIRS)
    sources = find_sources([str(target(texts, name)) for name in names])
    build_shards(sources, tokenizer, args.work / "train")
    for label, name in HELD_OUT.items():
        sources = find_sources([str(target(texts, name))])
        build_shards(sources, tokenizer, args.work / f"valid-{label}", workers=1)
    tokens = read_index(args.work / "train")["tokens"]
    print(f"tokens: {tokens:,}, {time.monotonic() - began:.0f} s", flush=True)


def shares(work: list[dict[str, Any]], devices: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The cells of each device: an architecture each, so that a short run is cut alike for both."""
    out: list[list[dict[str, Any]]] = [[] for _ in devices]
    for cell in work:
        out[list(CENTRE).index(cell["arch"]) % len(devices)].append(cell)
    return out


def plan(args: argparse.Namespace) -> None:
    """Print the cells, the lanes and the time that they are expected to take."""
    work = cells(args)
    rows = []
    for cell in work:
        model = cell["model"]
        shape = f"{model['num_layers']} x {model['hidden_size']}"
        tries = ", ".join(f"{rate:g}" for rate in cell["rates"])
        rows.append([cell["arch"], cell["size"], shape, tries, f"{predicted(cell):.0f}"])
    print("\n".join(table(["architecture", "size", "shape", "rates", "GPU seconds"], rows)))
    print(
        f"\nsteps of {args.batch} x {args.length} tokens; {args.rates} tuning runs of "
        f"{args.tune_tokens / 1e6:g}M tokens and {args.seeds} final runs of {args.tokens / 1e6:g}M "
        "a cell, at most one epoch; one more rate where the best lies at the edge"
    )
    for device, share in zip(args.devices, shares(work, args.devices), strict=True):
        names = ", ".join(f"{c['arch']} {c['size']}" for c in share)
        print(f"{device}: {names}: {sum(map(predicted, share)):.0f} s of the GPU")
    total = sum(map(predicted, work)) / len(args.devices)
    print(f"expected: {total:.0f} s on {len(args.devices)} GPUs, and 20-60 s to compile")


def run(args: argparse.Namespace) -> None:
    """All runs that --out has no row of yet, then more seeds while there is time."""
    from nomatmul.train.shards import read_index

    args.out.mkdir(parents=True, exist_ok=True)
    rows = adopt(args.out, environment(args.commit))
    stream_tokens = read_index(args.work / "train")["tokens"]
    first = [{**cell, "tune": True} for cell in order(rows, cells(args))]
    more = [
        {**cell, "tune": False, "seeds": [args.seeds + n]}
        for n in range(1, 1 + args.more_seeds)
        for cell in first
    ]
    todo = []
    for cell in first + more:
        left = missing(rows, cell, stream_tokens)
        if left:
            todo.append(cell)
            if cell["tune"]:
                print(f"to do: {cell['arch']} {cell['size']}: {', '.join(left)}", flush=True)
    again = {(r["arch"], r["size"]) for r in rows if r["stage"] == "check"}
    for cell in first:
        name = (cell["arch"], cell["size"])
        if name == ("mlgru", args.check) and name not in again:
            todo.append({**cell, "tune": False, "stage": "check", "seeds": [1]})
    log_path = args.out / "scaling.log"
    with open(log_path, "ab") as log:
        threads = [
            threading.Thread(target=Device(args, device, share, log).run)
            for device, share in zip(args.devices, shares(todo, args.devices), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(log_path.read_text("utf-8", "replace")[-8000:])


def adopt(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier rows in `out`, each told its commit; the machines of all runs go to one file."""
    file, machine = out / "scaling-rows.jsonl", out / "scaling-machine.json"
    rows = read_rows(file)
    earlier: dict[str, Any] = {}
    if rows and machine.exists():
        earlier = json.loads(machine.read_text())
        before = [*earlier.pop("earlier", []), earlier]
        about = {**about, "earlier": before}
    machine.write_text(json.dumps(about, indent=1) + "\n")
    if rows:
        rows = [{"commit": earlier.get("commit", "unknown"), **row} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


class Device:
    """The processes of one GPU, a cell each: two train, the next ones get ready meanwhile."""

    def __init__(
        self, args: argparse.Namespace, device: str, work: list[dict[str, Any]], log: Any
    ) -> None:
        self.args, self.device, self.log = args, device, log
        self.waiting = deque(work)
        self.ready: deque[subprocess.Popen[bytes]] = deque()
        self.running: list[subprocess.Popen[bytes]] = []
        self.deadline = args.began + args.seconds
        self.environment = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "6",
            "TRITON_CACHE_DIR": str(args.work / "triton"),
            "OMP_NUM_THREADS": "1" if device == "cpu" else "6",
            "PYTHONUNBUFFERED": "1",
        }
        if device != "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")

    def run(self) -> None:
        """Until all is done, or some seconds after the deadline."""
        lanes, ahead = (1, 0) if self.device == "cpu" else (LANES, AHEAD)
        while self.waiting or self.ready or self.running:
            self.running = [p for p in self.running if not self._ended(p)]
            if time.time() > self.deadline:
                self._stop()
                return
            while self.waiting and len(self.ready) + len(self.running) < lanes + ahead:
                self.ready.append(self._start(self.waiting.popleft()))
            while self.ready and len(self.running) < lanes:
                self._go(self.ready.popleft())
            time.sleep(0.1)

    def _start(self, cell: dict[str, Any]) -> subprocess.Popen[bytes]:
        cell = {**cell, "deadline": self.deadline}
        cell["device"] = "cpu" if self.device == "cpu" else "cuda"
        command = [sys.executable, str(Path(__file__).with_name("cell.py")), json.dumps(cell)]
        # The twin has one kernel of ours, for the head's loss: torch.compile makes its own.
        ops = "naive" if cell["arch"] == "transformer" else self.args.ops
        return subprocess.Popen(
            command,
            env={**self.environment, "NOMATMUL_OPS": ops},
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=with_parent(),
        )

    def _go(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it failed already: its exit status tells
            process.stdin.write(b"go\n")
            process.stdin.close()
        self.running.append(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> bool:
        code = process.poll()
        if code:
            print(f"{self.device}: a cell ended with {code}, see scaling.log", flush=True)
        return code is not None

    def _stop(self) -> None:
        """Cut runs have some seconds to write their rows; what has not begun ends at once."""
        for process in self.ready:
            process.kill()
        end = time.time() + 15
        for process in [*self.running, *self.ready]:
            try:
                process.wait(timeout=max(end - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def fit(args: argparse.Namespace) -> None:
    """Curves, gaps, plots and the page from the rows in --out."""
    page.report(args.out)
    print((args.out / "scaling.md").read_text())


def write_page(args: argparse.Namespace) -> None:
    """The tables of page.md."""
    page.write(args.out)


def everything(args: argparse.Namespace) -> None:
    """prepare, run and fit."""
    prepare(args)
    plan(args)
    run(args)
    fit(args)


# Of a dry run: two cells, one rate and one seed each, a handful of steps.
TINY: dict[str, Any] = {
    "step": "all", "devices": "cpu", "sizes": "S", "tokens": 512, "tune_tokens": 256, "rates": 1,
    "seeds": 1, "more_seeds": 0, "length": 32, "batch": 4, "warmup": 2, "eval_tokens": 200,
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    steps = {
        "prepare": prepare, "plan": plan, "run": run, "fit": fit, "all": everything,
        "page": write_page,
    }  # fmt: skip
    parser = study_parser(__doc__, steps, WORK)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--tokens", type=float, default=40e6, help="of a final run")
    parser.add_argument("--tune-tokens", type=float, default=10e6, help="of a tuning run")
    parser.add_argument("--rates", type=int, default=3, help="learning rates to try in each cell")
    parser.add_argument("--seeds", type=int, default=2, help="final runs of each cell")
    parser.add_argument("--more-seeds", type=int, default=2, help="at most, if there is time")
    parser.add_argument(
        "--check", choices=SIZES, help="last, MatMul-free seed 1 of this size again, to compare"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=80, help="optimiser steps")
    parser.add_argument("--eval-tokens", type=float, default=2e6, help="at most, a held-out text")
    parser.add_argument("--seconds", type=float, default=530, help="training ends then")
    parser.add_argument("--ops", choices=("", "naive", "triton"), default="", help="NOMATMUL_OPS")
    args = parser.parse_args(argv)
    settle(args, parser, steps, WORK, TINY)
    args.sizes = args.sizes.split(",")
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"unknown size {unknown.pop()!r}: choose of {', '.join(SIZES)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.action(args)


if __name__ == "__main__":
    main()
