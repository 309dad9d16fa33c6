"""What the commands of several studies are asked alike: texts, folders, devices, a dry run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import dry_run
from benchmarks.documents import HELD_OUT, TRAIN
from benchmarks.gpu_common import ROOT

Steps = dict[str, Callable[[argparse.Namespace], None]]


def study_parser(doc: str | None, steps: Steps, work: str) -> argparse.ArgumentParser:
    """A parser with the step and the common options; work: where tokens are kept by default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=steps, nargs="?", help="not needed with --tiny: all")
    parser.add_argument("--data", type=Path, help="folder of the texts (default: ../shared/data)")
    parser.add_argument("--work", type=Path, help=f"tokens, caches (default: {work})")
    parser.add_argument("--out", type=Path, help="rows, models, plots (default: runs/out)")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="cuda:0,cuda:1 or cpu")
    parser.add_argument("--compile", choices=("auto", "graph", "blocks", "off"), default="auto")
    parser.add_argument("--train", nargs="+", help="other training texts, below --data")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    dry_run.add_tiny(parser)
    return parser


def settle(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    steps: Steps,
    work: str,
    tiny: dict[str, Any],
) -> bool:
    """Fill in what was not given; tiny: of a dry run. Returns whether the texts are invented."""
    invented = bool(args.tiny and args.data is None)
    if args.tiny:
        dry_run.shrink(args, parser, **tiny)
        dry_run.folders(args, (*(args.train or TRAIN), *HELD_OUT.values()))
    if args.step is None:
        parser.error(f"a step is needed: {', '.join(steps)}")
    args.data = args.data or ROOT.parent / "shared/data"
    args.work, args.out = args.work or Path(work), args.out or Path("runs/out")
    args.began = time.time()
    args.devices = tuple(args.devices.split(","))
    args.action = steps[args.step]
    return invented
