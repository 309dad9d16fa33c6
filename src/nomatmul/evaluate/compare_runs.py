"""The runs of a comparison: `nomatmul train`'s own, each in a process that ends with this one.

`python -m nomatmul.evaluate.compare_runs` reads a run as JSON from its standard input, trains it
and appends its row.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.train import children
from nomatmul.train.config import TrainConfig
from nomatmul.train.metrics import Console, duration, read_metrics
from nomatmul.train.tokens import open_stream

LOG = "runs.log"  # in OUT: what the processes print
_START = 5.0  # seconds until a process trains
_GRACE = 15.0  # seconds after the deadline in which runs save what they have


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed. config: a TrainConfig as plain values.

    train, valid: token directories. directory: of the run; keep: where its model stays, or "".
    row: the columns of its row in the file `rows` that are known before it starts.
    """

    config: dict[str, Any]
    train: list[str]
    valid: list[str]
    directory: str
    keep: str
    rows: str
    row: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row['section']} {self.row['variant']}, seed {self.row['seed']}"

    def ended(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Has it a row? Diverged ones count, those that an older version cut do not."""
        keys = ("section", "variant", "stage", "seed", "identity", "steps_planned")
        return any(
            row["status"] != "cut" and all(row.get(key) == self.row[key] for key in keys)
            for row in rows
        )


def train_all(
    runs: Sequence[Run],
    out: Path,
    slots: Sequence[str],
    *,
    deadline: float | None,
    threads: int,
    log: Callable[[str], None],
    tick: Callable[[], None],
) -> list[str]:
    """Train the runs in order, one a slot at a time; the reasons of those that failed.

    slots: devices, one that takes several runs at a time as often. deadline: seconds since the
    epoch; then they save their state, from which the next start goes on. tick: called now and then.
    """
    waiting, failed = deque(runs), list[str]()
    busy: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    with open(out / LOG, "ab") as output:
        try:
            while waiting or busy:
                for slot, device in enumerate(slots):
                    if slot in busy and (code := busy[slot][1].poll()) is not None:
                        run, _ = busy.pop(slot)
                        if code:
                            failed.append(f"{run.name} ended with exit status {code}")
                            log(f"{failed[-1]}, see {output.name}")
                    if slot not in busy and waiting:
                        run = waiting.popleft()
                        log(f"{device}: {run.name}")
                        busy[slot] = (run, _start(run, device, out, threads, output))
                if deadline is not None and time.time() > deadline:
                    _stop([process for _, process in busy.values()])
                    break
                tick()
                time.sleep(0.1)
        finally:  # also a second Ctrl-C: what is left then dies with this process
            for _, process in busy.values():
                process.kill()
                process.wait()
    return failed


def _start(
    run: Run, device: str, out: Path, threads: int, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).resolve().parents[2])
    values = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    values["PYTHONPATH"] = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    if device != "cpu":
        values["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:").replace("cuda", "0")
        values["OMP_NUM_THREADS"] = values["TORCHINDUCTOR_COMPILE_THREADS"] = "6"
        values["TORCHINDUCTOR_CACHE_DIR"] = str(out / "cache/inductor")
        values["TRITON_CACHE_DIR"] = str(out / "cache/triton")
    process = subprocess.Popen(
        children.command(__name__, device.partition(":")[0]),
        env=values, stdin=subprocess.PIPE, stdout=output, stderr=output,
        start_new_session=True,  # Ctrl-C reaches us alone
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(run)).encode())
    process.stdin.close()
    return process


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + _GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.1)


def train(run: Run, device: str) -> None:
    """Train one run, or go on with it; its row when it ends, none when it is stopped."""
    from nomatmul.train.job import run as train_model
    from nomatmul.train.step_log import NonFiniteError

    config, directory, status = TrainConfig.from_dict(run.config), Path(run.directory), "ok"
    try:
        ended = train_model(
            config, run.train, directory, valid=run.valid, device=device, force=True
        )
        if ended.model is None:
            return
        if run.keep:
            shutil.rmtree(run.keep, ignore_errors=True)
            Path(run.keep).parent.mkdir(exist_ok=True)
            os.replace(ended.model, run.keep)
    except NonFiniteError as error:
        print(error, file=sys.stderr)
        status = "diverged"
    append_row(Path(run.rows), {**run.row, "status": status, **_measured(directory, config)})
    shutil.rmtree(directory)


def _measured(directory: Path, config: TrainConfig) -> dict[str, Any]:
    """What a run's metrics hold: scores of the last look at the held-out text, speed, curve."""
    seconds, tokens, last = 0.0, 0, dict[str, Any]()
    curve: list[list[float]] = []  # step, held-out loss, seconds of training
    for row in read_metrics(directory):
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        elif "valid_loss" in row:
            last = row
            curve.append([row["step"], round(row["valid_loss"], 5), round(seconds, 2)])
    scores = {"loss": last.get("valid_loss"), "bpb": last.get("valid_bits_per_byte")}
    return {
        "steps": tokens // config.tokens_per_step,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / max(seconds, 1e-9)),
        "held_out_curve": curve,
        **{name: value for name, value in scores.items() if value is not None},
    }


def run_costs(runs: Sequence[Run], threads: int) -> dict[str, float]:
    """Seconds of one run of each variant on this CPU, judged by a micro-batch of random tokens."""
    import torch

    from nomatmul.train.model import build_model

    before, costs = torch.get_num_threads(), dict[str, float]()
    torch.set_num_threads(threads or before)
    for run in {run.row["variant"]: run for run in runs}.values():
        config = TrainConfig.from_dict(run.config)
        model = build_model(config.model)
        shape = (config.micro_batch_size, config.sequence_length)
        x_BT = torch.randint(config.model.vocab_size, shape)
        y_BT, options = x_BT, dict[str, Any]()
        if not config.model.causal:
            y_BT, options = x_BT.clone(), {"predicted": config.targets}
            y_BT[:, config.masked_tokens :] = -100
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            model.loss(x_BT, y_BT, **options)[0].backward()
        held = min(config.eval_tokens, sum(len(open_stream(path)) for path in run.valid))
        looked = held * (config.steps // config.eval_interval) / 3  # forward alone
        speed = x_BT.numel() / (time.monotonic() - began)
        costs[run.row["variant"]] = (config.steps * config.tokens_per_step + looked) / speed
    torch.set_num_threads(before)
    return costs


def sum_of(runs: Sequence[Run], costs: dict[str, float]) -> float:
    """Seconds of these runs behind each other."""
    return sum(_START + costs[run.row["variant"]] for run in runs)


def about(seconds: float) -> str:
    """A time in words that claim no more than an estimate can."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} seconds"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


class TotalBar:
    """How far all runs together are: those that have ended, by what each costs."""

    def __init__(
        self, console: Console, runs: Sequence[Run], costs: dict[str, float], rows: Path
    ) -> None:
        self.console, self.runs, self.rows = console, runs, rows
        self.costs = costs or {run.row["variant"]: 1.0 for run in runs}
        self.total = sum_of(runs, self.costs)
        self.estimated = self.total if costs else 0.0
        self.began = self._shown = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self._shown < 1.0:
            return
        self._shown = time.monotonic()
        rows = read_rows(self.rows)
        todo = [run for run in self.runs if not run.ended(rows)]
        share = 1 - sum_of(todo, self.costs) / self.total
        passed = self._shown - self.began
        expected = passed / share if share > 0 else self.estimated
        left = f", {duration(max(expected - passed, 0.0))} left" if expected else ""
        # Between the ends of two runs the clock moves the bar, but never past them.
        moved = min(passed / expected, share + 1 / len(self.runs)) if expected else share
        done = len(self.runs) - len(todo)
        self.console.progress(max(share, moved), f"{done} of {len(self.runs)} runs{left}")


if __name__ == "__main__":
    train(Run(**json.loads(sys.stdin.read())), sys.argv[1])
