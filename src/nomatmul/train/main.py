"""The body of `nomatmul train`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nomatmul._extras import require_train
from nomatmul.train.args import TrainArgs, started_by_torchrun
from nomatmul.train.children import tie_to
from nomatmul.train.config import TrainConfig

if TYPE_CHECKING:
    from nomatmul.train.result import RunResult


def build_config(args: TrainArgs) -> TrainConfig:
    """What is trained. Raises ValueError naming what is wrong."""
    return args.config()


def main(args: TrainArgs) -> int:
    """Train as the arguments say; returns the exit status.

    0: finished, or stopped by SIGTERM with everything saved; 130: Ctrl-C, saved. Raises ValueError,
    OSError or RuntimeError (one line each) for bad input, NaN and full disks: status 1.
    """
    if started_by_torchrun():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # its agent is our parent
            tie_to(os.getppid(), signal.SIGTERM)  # which saves
        _leave(_one_of_many(args))
    return _show(_run(args), args)


def _run(args: TrainArgs) -> RunResult:
    config = build_config(args)
    # Threads of torch that wait for each other spin; on a busy machine that was ten times slower
    # than sleeping soon (docs/log/command-line.md). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    require_train("training")
    from nomatmul.train.job import run
    from nomatmul.train.result import stopped
    from nomatmul.train.signals import Stopped, StopSignals

    result = run(config, list(args.data), args.out, **args.options())
    if result.model is not None and os.environ.get("RANK", "0") == "0":
        try:
            with StopSignals():
                args.finish(result.model)
        except Stopped as stop:  # the run is saved, and the same command ends it
            return stopped(stop.number, result.step, result.elapsed)
    return result


def _show(result: RunResult, args: TrainArgs) -> int:
    """Say how the run ended; the exit status."""
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    elif result.status == "finished":
        print(f"trained {result.step} steps; the model is in {result.model}")
        _show_finished(result, args)
    else:
        print(
            f"{result.status} at step {result.step}; the same command continues the run",
            file=sys.stderr,
        )
    return 130 if result.status == "interrupted" else 0


def _show_finished(result: RunResult, args: TrainArgs) -> None:
    """Time and scores of the run, its picture, and what to do next: unless it is to be quiet."""
    if args.quiet:
        return
    from nomatmul.train.metrics import duration

    facts = [f"{duration(result.elapsed)} of training"]
    if result.valid_bits_per_byte is not None:
        facts.append(f"{result.valid_bits_per_byte:.4f} bits per byte held out")
    elif result.valid_loss is not None:
        facts.append(f"held-out loss {result.valid_loss:.4f} nats a hidden token")
    if result.curve is not None:
        facts.append(f"its curve is {result.curve}")
    print("; ".join(facts))
    packed = f"packed/{Path(args.out).name}"
    if result.valid_accuracy is None:
        print(f"next: nomatmul pack {args.out} {packed}")
        print(f'      nomatmul generate --model {packed} --prompt "..."')
    else:
        print(f"next: nomatmul finetune {args.out} --task FILE.tsv --out {args.out}-tuned")
        print(f"      nomatmul pack {args.out} {packed}")


def _one_of_many(args: TrainArgs) -> int:
    """`main` in a process of torchrun: one of them reports an error, rank 0 the result."""
    first = os.environ.get("RANK") == "0"
    try:
        result = _run(args)
    except Exception as error:  # as the command does, but once for all processes
        if os.environ.get("NOMATMUL_DEBUG") == "1":
            traceback.print_exc()
        # Mistakes that are found before the processes have met are found by all of them.
        elif getattr(error, "reported", False) or (first and not hasattr(error, "reported")):
            print(f"nomatmul: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if first:
        return _show(result, args)
    return 130 if result.status == "interrupted" else 0


def _leave(status: int) -> NoReturn:
    """End at once: the interpreter's own end would wait for collectives that never finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
