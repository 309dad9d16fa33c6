"""Many GPUs: do they continue the same losses, how fast are they, how does a lost one show?

    PYTHONPATH=src python benchmarks/many_gpus.py --ranks 1,2 --output DIR/many-gpus.md
    PYTHONPATH=src python benchmarks/many_gpus.py --device cpu --ranks 1,2,4   (no speed)

Runs the command `nomatmul train`, alone and under torchrun, on text made of this repository:
(a) 20 steps on every number of ranks, and once resumed from one number on the next;
(b) tokens/s and peak memory of two sizes, 8 x 2048 tokens a GPU;
(c) one rank killed, one rank stopped (a hung collective): seconds until the message.
What does not fit into --seconds is left out, and said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dry_run import add_tiny, shrink, temporary
from gpu_children import terminated
from gpu_common import ROOT, describe, environment
from with_parent import kill_group, with_parent

from nomatmul.evaluate.compare_report import table

STEPS = 20
_DRIFT = """\
All runs have the same batches. Sums in another order differ by float rounding; where that flips
the rounding of an activation or a weight the runs drift apart. The control shows how fast they do
so on one rank: the same batches, added up in other micro-batches."""
TIMEOUT = 10  # seconds: the collective time limit of the jobs that are disturbed


@dataclasses.dataclass
class Bench:
    """One run of this script."""

    device: str
    ranks: list[int]
    sizes: list[str]
    compile: str
    deadline: float
    work: Path
    tiny: bool = False
    started: float = dataclasses.field(default_factory=time.monotonic)
    port: int = 29600

    @property
    def steps(self) -> int:
        """Of (a)."""
        return 5 if self.tiny else STEPS

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def launch(self, ranks: int, command: list[str], log: Path) -> subprocess.Popen:
        """Start a Python command on so many ranks; both streams go to `log`."""
        words = [sys.executable]
        if ranks > 1:
            self.port += 1
            words += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
            words += [f"--master-port={self.port}"]
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*words, *command], stdout=file, stderr=file, cwd=ROOT,
                preexec_fn=with_parent(signal.SIGTERM),  # torchrun then ends its ranks
            )  # fmt: skip

    def text(self) -> list[str]:
        """This repository's own prose and code, about a megabyte, as the training text."""
        path = self.work / "text.txt"
        if not path.exists():
            names = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
            code = ("csrc/**/*.h", "csrc/**/*.cc", "src/**/*.py", "tests/**/*.py")
            for pattern in () if self.tiny else code:
                names += sorted(ROOT.glob(pattern))
            path.write_text("\n".join(name.read_text("utf-8") for name in names), "utf-8")
        return [str(path)]

    def train(self, out: Path, steps: int, *more: str) -> list[str]:
        """The command of a small training: micro-batches of 2, so that up to 8 ranks fit."""
        settings = {
            "model.vocab_size": 512, "model.hidden_size": 256, "sequence_length": 128,
            "learning_rate": 1e-3, "batch_size": 16, "micro_batch_size": 2,
            "schedule": "constant", "warmup_steps": 5,
            "eval_interval": 0, "diagnostics_interval": 0, "sample_interval": 0,
            "log_interval": 1, "checkpoint_interval": 5, "compile": "off",
        }  # fmt: skip
        words = ["-m", "nomatmul", "train", "cpu_minute", "--data", *self.text(), "--quiet"]
        words += ["--out", str(out), "--steps", str(steps), "--device", self.device]
        words += [f"--set={name}={value}" for name, value in settings.items()]
        if self.device == "cpu":
            words += ["--set=model.hidden_size=96", "--set=sequence_length=64"]
        return [*words, "--workers=1", "--override-config", *more]

    def finish(self, processes: list[tuple[subprocess.Popen, Path]]) -> None:
        for process, log in processes:
            try:
                status = process.wait(max(self.left(), 1))
            except subprocess.TimeoutExpired:
                kill_group(process)
                raise RuntimeError(f"{log.name} did not end in time") from None
            if status:
                raise RuntimeError(f"{log.name}: status {status}: {log.read_text()[-1500:]}")


def losses_of(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def compare_losses(bench: Bench) -> str:
    """(a) A table of all losses; the last lines are deviations from the first column.

    Sums in another order differ by float rounding, and a rounding that flips an int8 or a ternary
    value is a small step, not a rounding any more: two runs drift apart. How fast, the control
    shows: one rank with the same batches cut into other micro-batches.
    """
    chain = [*bench.ranks, bench.ranks[0]] if len(bench.ranks) > 1 else bench.ranks
    ends = [bench.steps * (part + 1) // len(chain) for part in range(len(chain))]
    chained = bench.work / "chain"
    for part, (ranks, end) in enumerate(zip(chain, ends, strict=True)):
        jobs = []
        shutil.rmtree(chained / "model", ignore_errors=True)
        log = bench.work / f"chain-{part}.log"
        jobs.append((bench.launch(ranks, bench.train(chained, end), log), log))
        if part == len(chain) - 1:
            log, out = bench.work / "control.log", bench.work / "control"
            control = bench.train(out, bench.steps, "--set=micro_batch_size=4")
            jobs.append((bench.launch(bench.ranks[0], control, log), log))
        if part < len(bench.ranks):
            log = bench.work / f"whole-{ranks}.log"
            out = bench.work / f"whole-{ranks}"
            jobs.append((bench.launch(ranks, bench.train(out, bench.steps), log), log))
        bench.finish(jobs)
        bench.note(f"(a) part {part + 1} of {len(chain)}: {ranks} ranks to step {end}")
    columns = {f"{n} rank{'s' if n > 1 else ''}": losses_of(bench.work / f"whole-{n}")
               for n in bench.ranks}  # fmt: skip
    columns["resumed " + " → ".join(str(n) for n in chain)] = losses_of(chained)
    columns["control: other micro-batches"] = losses_of(bench.work / "control")
    owner = [n for part, n in enumerate(chain)
             for _ in range(ends[part] - (ends[part - 1] if part else 0))]  # fmt: skip
    first = next(iter(columns.values()))
    assert all(len(column) == bench.steps for column in columns.values())
    rows = [
        [step + 1, *(f"{column[step]:.6f}" for column in columns.values()), owner[step]]
        for step in range(bench.steps)
    ]
    most = [max(abs(a - b) for a, b in zip(column, first, strict=True))
            for column in columns.values()]  # fmt: skip
    early = [max(abs(a - b) for a, b in zip(column[:5], first, strict=False))
             for column in columns.values()]  # fmt: skip
    rows.append(["deviation of steps 1-5", *(f"{value:.1e}" for value in early), ""])
    rows.append(["largest deviation", *(f"{value:.1e}" for value in most), ""])
    return "\n".join(table(["step", *columns, "resumed on"], rows))


def measure_speed(bench: Bench) -> str:
    """(b) One row a size and a number of ranks, with the efficiency against one."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for ranks in bench.ranks:
        if bench.left() < 30:
            bench.note(f"(b) left out: {ranks} ranks, the time is over")
            break
        log = bench.work / f"speed-{ranks}.log"
        command = ["benchmarks/many_gpus_speed.py", *bench.sizes, f"--compile={bench.compile}"]
        process = bench.launch(ranks, [*command, f"--device={bench.device}"], log)
        try:
            process.wait(max(bench.left(), 1))
        except subprocess.TimeoutExpired:
            kill_group(process)
        lines = [line for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
        for row in map(json.loads, lines):
            results[row["size"], ranks] = row
        if not lines:
            bench.note(f"(b) {ranks} ranks gave nothing: {log.read_text('utf-8')[-1500:]}")
        bench.note(f"(b) {ranks} ranks: {lines}")
    rows = []
    for (size, ranks), row in results.items():
        if "error" in row:
            rows.append([size, ranks, row["recompute"], row["error"], "", "", ""])
            continue
        one = results.get((size, 1), {}).get("tokens_per_second")
        share = f"{row['tokens_per_second'] / (ranks * one):.3f}" if one else "-"
        speed, peak = f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}"
        step = f"{row['step_ms']:.1f}"
        rows.append([size, ranks, row["recompute"], speed, step, peak, share])
    head = ["size", "GPUs", "recompute", "tokens/s", "step ms", "peak GB a GPU", "efficiency"]
    return "\n".join(table(head, rows))


def disturb(bench: Bench, number: signal.Signals, rows: dict[str, list]) -> None:
    """(c) Send a signal to rank 1 of two and wait for the message."""
    what = {"SIGKILL": "killed", "SIGSTOP": "stopped (hung)"}[number.name]
    out, log = bench.work / f"lost-{number.name}", bench.work / f"lost-{number.name}.log"
    command = bench.train(out, 1_000_000, f"--collective-timeout={TIMEOUT}")
    process = bench.launch(2, command, log)
    try:
        latest = out / "checkpoints/latest"
        while not (latest.exists() and len(losses_of(out)) > 10) and bench.left() > 0:
            time.sleep(0.1)
        victim = next(pid for pid in children(process.pid) if rank_of(pid) == "1")
        os.kill(victim, number)
        began = time.monotonic()
        line = ""
        while not line and time.monotonic() - began < 60 and process.poll() is None:
            time.sleep(0.02)
            line = next(
                (x for x in log.read_text("utf-8").splitlines() if "nomatmul: error" in x), ""
            )
        seconds = time.monotonic() - began
        line = line or next(
            (x for x in log.read_text("utf-8").splitlines() if "nomatmul: error" in x), "no message"
        )
        if number == signal.SIGSTOP:
            os.kill(victim, signal.SIGKILL)
        status = process.wait(40)
        from nomatmul.train.manifest import find_fault

        fault = find_fault(latest.parent / latest.read_text("utf-8").strip())
        rows[what] = [what, f"{seconds:.1f}", status, fault or "intact", line]
    except Exception as error:  # the other questions are still worth their answers
        rows[what] = [what, "-", "-", "-", f"{type(error).__name__}: {error}"]
    finally:
        if process.poll() is None:
            kill_group(process)
    bench.note(f"(c) {what}: {rows[what]}")


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def rank_of(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((w[5:].decode() for w in words if w.startswith(b"RANK=")), None)


def run(bench: Bench, save: Callable[[list[str]], None]) -> list[str]:
    """The tables; what is there goes to `save` after each question."""
    lost: dict[str, list] = {}
    threads = []
    if max(bench.ranks) > 1:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            thread = threading.Thread(target=disturb, args=(bench, number, lost))
            thread.start()
            threads.append(thread)
            if bench.device == "cpu":  # few cores: one after the other
                thread.join()
    parts = []
    try:
        losses = compare_losses(bench)
        parts += ["## (a) The same losses on any number of ranks", "", _DRIFT, "", losses, ""]
    except RuntimeError as error:
        parts += ["## (a) failed", "", f"    {error}", ""]
        bench.note(f"(a) {error}")
    save(parts)
    for thread in threads:
        thread.join()
    if bench.sizes:
        parts += ["## (b) Speed and memory, 8 x 2048 tokens a GPU", "", measure_speed(bench), ""]
        save(parts)
    if lost:
        head = ["rank 1 was", "seconds to the message", "exit status", "checkpoint", "message"]
        limit = f"The collective time limit is {TIMEOUT} s."
        parts += ["## (c) A lost rank", "", limit, "", *table(head, list(lost.values())), ""]
        save(parts)
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, rising")
    parser.add_argument("--sizes", nargs="*", default=["mmfree_1_3b:block", "mmfree_370m:mlp"],
                        help="RECIPE:RECOMPUTE for (b); none: leave (b) out")  # fmt: skip
    parser.add_argument("--compile", default="off", help="TrainConfig.compile for (b)")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, help="folder; the tables go to many-gpus.md there")
    parser.add_argument("--output", type=Path, help="file of the tables (Markdown), instead")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        shrink(args, parser, device="cpu", ranks="1", seconds=600.0)
        args.out = args.out or temporary()
    if args.out is not None:
        args.output = args.output or args.out / "many-gpus.md"
    sizes = args.sizes if args.device == "cuda" else []
    ranks = [int(word) for word in args.ranks.split(",")]
    with terminated(), tempfile.TemporaryDirectory(prefix="many-gpus-") as scratch:
        bench = Bench(args.device, ranks, sizes, args.compile, time.monotonic() + args.seconds,
                      Path(scratch), args.tiny)  # fmt: skip
        about = environment(args.commit)

        def save(parts: list[str]) -> None:
            if args.output is not None:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(page(about, parts), "utf-8")

        print(page(about, run(bench, save)))


def page(about: dict[str, Any], parts: list[str]) -> str:
    return "\n".join(["# Training on many GPUs", "", describe(about), "", *parts])


if __name__ == "__main__":
    main()
