"""The body of `nomatmul train`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from nomatmul.train.args import TrainArgs
from nomatmul.train.config import TrainConfig, apply_overrides
from nomatmul.train.recipes import recipe


def build_config(args: TrainArgs) -> TrainConfig:
    """The recipe with the command's overrides. Raises ValueError naming what is wrong."""
    direct = [
        f"{name}={value}"
        for name in ("steps", "time_limit", "seed")
        if (value := getattr(args, name)) is not None
    ]
    return apply_overrides(recipe(args.recipe), [*args.set, *direct])


def main(args: TrainArgs) -> int:
    """Train as the arguments say; returns the exit status.

    0: finished, or stopped by SIGTERM with everything saved; 130: Ctrl-C, saved. Raises ValueError,
    OSError or RuntimeError (one line each) for bad input, NaN and full disks: status 1.
    """
    config = build_config(args)
    # Threads of torch that wait for each other spin; on a busy machine that was ten times slower
    # than sleeping soon (docs/log.md). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        from nomatmul.train.job import run
    except ImportError as error:
        raise ImportError(f"training needs the extra `train` ({error})") from None
    result = run(
        config,
        list(args.data),
        args.out,
        valid=list(args.valid),
        tokenizer=args.tokenizer,
        text_field=args.text_field,
        document_start=args.document_start,
        tokens=args.tokens,
        workers=args.workers,
        device=args.device,
        resume=args.resume,
        override_config=args.override_config,
        quiet=args.quiet or args.json,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    elif result.status == "finished":
        print(f"trained {result.step} steps; the model is in {result.model}")
    else:
        print(
            f"{result.status} at step {result.step}; the same command continues the run",
            file=sys.stderr,
        )
    return 130 if result.status == "interrupted" else 0
