"""The recipe study on a GPU: texts to tokens, cells that have no row yet, models that come back.

    python studies/recipes/run.py gather  --data ../shared/data --work runs/recipes
    python studies/recipes/run.py plan
    python studies/recipes/run.py all     --work runs/recipes --out $OUT --seconds 570
    python studies/recipes/run.py all --tiny --devices cpu --work runs/recipes --out runs/tiny

`gather` runs where the texts are; WORK/texts and the tokenizer beside them travel to the GPU.
`all` is prepare and train. Rows go to OUT/rows.jsonl as they are measured; WORK/rows.jsonl keeps
them for the next command, which goes on behind them. A cell that cannot end in time is not begun.
As soon as a model of the parts `pareto` and `box12` is trained it is packed (or the twin
rounded in several forms and scored, quantised.py) beside the runs that go on. WORK/archives gets
MODEL.tar.gz; OUT a copy of each, once, while it has room.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.gpu_common import ROOT, environment, git_commit, python_path
from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows
from nomatmul.formats.files.atomic import write_file
from studies.compare.plan import Cell, missing
from studies.compare.pool import PoolOptions, run_pool
from studies.recipes import texts
from studies.recipes.cells import Amount, guess
from studies.recipes.change import ChangedCell
from studies.recipes.first import FINISHED
from studies.recipes.plan import PARTS, plan

# What comes back of OUT at most: bytes of a file, bytes and number of all files.
FILE_LIMIT, ALL_LIMIT, FILES = 16 << 20, 60 << 20, 8
PAUSE = 0.5  # seconds between looks for models to finish


def cells(args: argparse.Namespace) -> list[ChangedCell]:
    rows = (args.out / "rows.jsonl").resolve()
    commit = args.commit or git_commit()
    every = plan(args.amount, args.work.resolve(), rows, args.parts, commit=commit)
    return [c for c in every if not args.cells or f"{c.section}-{c.variant}" in args.cells]


def show(args: argparse.Namespace) -> None:
    """Print the cells in their order, with what the scaling study's speeds promise."""
    lines, total = [], 0.0
    for cell in cells(args):
        config = cell.train_config
        tokens = config.steps * config.tokens_per_step * len(cell.seeds)
        seconds = tokens / guess(config, cell.change)
        total += seconds
        shape = f"{config.model.num_layers} x {config.model.hidden_size}"
        seeds = ", ".join(map(str, cell.seeds))
        lines.append([cell.section, cell.label, shape, f"{config.learning_rate:g}",
                      f"{tokens / 1e6:.0f}M", seeds, f"{seconds:.0f}", f"{total:.0f}"])  # fmt: skip
    header = ["section", "cell", "shape", "rate", "tokens", "seeds", "GPU seconds", "sum"]
    print("\n".join(table(header, lines)))


def gather(args: argparse.Namespace) -> None:
    texts.gather(args.data, args.work)


def prepare(args: argparse.Namespace) -> None:
    began = time.monotonic()
    texts.prepare(args.work)
    _log(args, f"tokens: {time.monotonic() - began:.0f} s")


def train(args: argparse.Namespace) -> None:
    """What no row has yet, until --after seconds before the end."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows, kept = args.out / "rows.jsonl", args.work / "rows.jsonl"
    if kept.exists() and not rows.exists():
        write_file(rows, kept.read_bytes())
    _write_machine(args)
    todo = with_models(missing(read_rows(rows), cells(args)), lambda text: _log(args, text))
    _log(args, f"to do: {sum(len(cell.seeds) for cell in todo)} runs")
    finisher = Finisher(args, [cell for cell in cells(args) if cell.section in FINISHED], rows)
    finisher.start()
    try:
        with open(args.out / "recipes.log", "ab") as log:
            options = PoolOptions(
                tuple(args.devices.split(",")),
                lanes=args.amount.lanes,
                ahead=args.ahead,
                deadline=args.began + args.seconds - args.after,
                cache=args.work,
                program="studies.recipes.trainer",
            )
            failed = run_pool(todo, options, log, lambda text: _log(args, text))
    finally:
        finisher.end(args.began + args.seconds)
        if rows.exists():
            write_file(kept, rows.read_bytes())
    done = [row for row in read_rows(rows) if row["status"] == "ok"]
    _log(args, f"{len(done)} rows, {len(failed) + len(finisher.failed)} failures")
    if finisher.failed:
        raise SystemExit("\n".join(finisher.failed))


def with_models(todo: list[ChangedCell], log: Callable[[str], None]) -> list[ChangedCell]:
    """The cells whose teachers are there, or are trained before them by this command."""
    chosen, coming = [], set[str]()
    for cell in todo:
        there = [name in coming or (cell.models / name).is_dir() for name in cell.change.needs]
        if not all(there):
            log(f"{cell.section}-{cell.variant} is left out: {cell.change.needs} are not here")
            continue
        chosen.append(cell)
        if cell.keep:
            coming |= {f"{cell.section}-{cell.variant}-{seed}" for seed in cell.seeds}
    return chosen


class Finisher(threading.Thread):
    """Packs or rounds every kept model once it lies there, one at a time, beside the training."""

    def __init__(self, args: argparse.Namespace, wanted: list[Cell], rows: Path) -> None:
        super().__init__(daemon=True)
        self.args, self.rows = args, rows
        self.waiting = {self._directory(cell): cell for cell in wanted}
        self.failed: list[str] = []
        self.last = float("inf")  # when to stop waiting, seconds since the epoch
        self.child: subprocess.Popen[bytes] | None = None

    @staticmethod
    def _directory(cell: Cell) -> Path:
        return Path(cell.keep) / f"{cell.section}-{cell.variant}-{cell.seeds[0]}"

    def run(self) -> None:
        while time.time() < self.last:
            ready = [path for path in self.waiting if path.is_dir()]
            if not ready and self.last < float("inf"):
                return
            for path in ready:
                self._finish(path, self.waiting.pop(path))
            time.sleep(PAUSE)

    def end(self, deadline: float) -> None:
        """Training is over: finish what is there, until the deadline."""
        self.last = deadline
        self.join(max(deadline - time.time(), 0))
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()

    def _finish(self, path: Path, cell: Cell) -> None:
        name = f"{cell.section}-{cell.variant}"
        archive = self.args.work / "archives" / f"{name}.tar.gz"
        if archive.exists():  # an earlier command made it
            send(archive, self.args.out)
            return
        archive.parent.mkdir(exist_ok=True)
        if cell.train_config.model.linear == "ternary":
            target = path.with_name(path.name + "-packed")
            words = ["-m", "nomatmul", "pack", str(path), str(target), "--packing", "1.6bit",
                     "--embedding", "int8", "--no-check"]  # fmt: skip
            if self._child(name, words, b""):
                write_archive(archive, target, name)
        else:
            script = str(Path(__file__).with_name("quantised.py"))
            device = "cpu" if self.args.devices == "cpu" else "cuda"
            whole = dataclasses.replace(cell, device=device, compile="off")
            if self._child(name, [script, str(path), str(self.rows)], whole.to_json().encode()):
                write_archive(archive, half(path), name)
        if archive.exists():
            send(archive, self.args.out)

    def _child(self, name: str, words: list[str], given: bytes) -> bool:
        environment = {**os.environ, "PYTHONPATH": python_path(), "NOMATMUL_OPS": "naive",
                       "OMP_NUM_THREADS": "2"}  # fmt: skip
        with open(self.args.out / "recipes.log", "ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment,
            )  # fmt: skip
            self.child.communicate(given)
        if code := self.child.returncode:
            self.failed.append(f"{name}: {words[-1]} ended with exit status {code}; see the log")
        return code == 0


def send(archive: Path, out: Path) -> None:
    """Copy the archive to `out`, unless a command before did so or there is no room."""
    sent = archive.with_suffix(".sent")
    there = [file for file in out.iterdir() if file.suffix != ".tmp"]
    size = archive.stat().st_size
    total = size + sum(file.stat().st_size for file in there)
    if sent.exists() or size > FILE_LIMIT or total > ALL_LIMIT or len(there) >= FILES:
        return
    write_file(out / archive.name, archive.read_bytes())
    sent.touch()


def half(directory: Path) -> Path:
    """The model's directory with bfloat16 weights, beside it."""
    import torch
    from safetensors.torch import load_file, save_file

    target = directory.with_name(directory.name + "-bf16")
    target.mkdir(exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    values = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(values, target / "model.safetensors", {"format": "pt"})
    write_file(target / "config.json", (directory / "config.json").read_bytes())
    return target


def write_archive(file: Path, directory: Path, name: str) -> None:
    temporary = file.with_suffix(".tmp")
    with tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
        archive.add(directory, name)
    temporary.rename(file)


def _write_machine(args: argparse.Namespace) -> None:
    file = args.out / "machine.json"
    about: dict[str, Any] = {**environment(args.commit), "lanes": args.amount.lanes}
    write_file(file, (json.dumps(about, indent=1) + "\n").encode())


def _log(args: argparse.Namespace, text: str) -> None:
    print(f"[{time.time() - args.began:4.0f} s] {text}", flush=True)


def everything(args: argparse.Namespace) -> None:
    prepare(args)
    train(args)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"gather": gather, "prepare": prepare, "plan": show, "train": train, "all": everything}
    parser.add_argument("step", choices=steps)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="texts, tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes-out"), help="rows, models")
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order")
    parser.add_argument("--cells", nargs="+", help="these alone, as SECTION-VARIANT")
    parser.add_argument("--devices", default="cuda:0", help="cuda:0 or cpu")
    parser.add_argument("--lanes", type=int, default=3, help="runs at a time on the GPU")
    parser.add_argument("--ahead", type=int, default=2, help="further cells that compile")
    parser.add_argument("--seconds", type=float, default=570, help="of the whole command")
    parser.add_argument("--after", type=float, default=45, help="of these, to finish models")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a dry run")
    args = parser.parse_args(words)
    args.began = time.time()
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}: choose of {', '.join(PARTS)}")
    args.amount = Amount(lanes=args.lanes, tiny=args.tiny)
    args.action = steps[args.step]
    return args


def main() -> None:
    args = parse()
    args.action(args)


if __name__ == "__main__":
    main()
