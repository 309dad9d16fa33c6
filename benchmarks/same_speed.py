"""Did a change keep the speed? Two source trees take turns on one machine.

Each tree has a process of its own (its `src` and `benchmarks` on the path, its own native core).
They take turns call by call, so that neighbours and clocks meet both. Rows: decoders (GLU in both
packings, union; one token, prompts of 2 to 256), the encoders of `bert_cpu.py`, the layers of
`fff_cpu.py`. One thread is timed by its own processor time, more by the clock. Processes are
started anew several times, because where memory and code come to lie moves a row by percents. The
table has the median of new/old over all pairs, its quartiles, and the median of each start.

    python benchmarks/same_speed.py --old OLD_TREE --new . --threads 1 --out results
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dry_run import add_tiny, temporary
from with_parent import kill_group, with_parent

import nomatmul

ROOT = Path(__file__).resolve().parents[1]
WORKER = "import same_speed_worker; same_speed_worker.main()"
KINDS = ("decoder", "encoder", "trees")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="the former tree, its native core built in place")
    parser.add_argument("--new", type=Path, default=ROOT, help="the new tree (default: this one)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--only", default=".", help="regular expression of row names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", type=int, default=3, help="of both processes")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row and start")
    parser.add_argument("--out", type=Path, help="folder for same-speed-N.json and .md")
    add_tiny(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.old, options.starts, options.rounds = options.new, 1, 2
        options.out, options.kinds = options.out or temporary(), ("trees",)
    if options.old is None or options.out is None:
        parser.error("--old and --out are needed, or --tiny")
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        rows += measure(kind, options)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"same-speed-{options.threads}"
    (options.out / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(to_table(rows))
    print(to_table(rows))
    return 0


def measure(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a name: milliseconds of both trees, pair by pair, start by start."""
    taken: dict[str, list[list[tuple[float, float]]]] = {}
    for _ in range(options.starts):
        sides = [_Side(tree, kind, options) for tree in (options.old, options.new)]
        try:
            names = [name for name in sides[0].names if re.search(options.only, name)]
            for name in names:
                pairs = [_pair(sides, name) for _ in range(options.rounds)]
                taken.setdefault(name, []).append(pairs)
        finally:
            for side in sides:
                kill_group(side.process)
    return [_row(name, starts) for name, starts in taken.items()]


class _Side:
    def __init__(self, tree: Path, kind: str, options: argparse.Namespace) -> None:
        tree = tree.resolve()
        # a dry run takes the package that runs here, which may be installed elsewhere
        package = Path(nomatmul.__file__).parents[1] if options.tiny else tree / "src"
        path = [package, tree / "benchmarks", ROOT / "benchmarks"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, kind, str(options.threads), str(options.tiny)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=with_parent(),
        )  # fmt: skip
        self.names: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a side ended; its message is above")
        return line

    def seconds(self, name: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._line())


def _pair(sides: list[_Side], name: str) -> tuple[float, float]:
    found: dict[int, float] = {}
    for side in random.sample((0, 1), 2):
        found[side] = sides[side].seconds(name)
    return found[0], found[1]


def _row(name: str, starts: list[list[tuple[float, float]]]) -> dict[str, Any]:
    pairs = [pair for start in starts for pair in start]
    ratios = sorted(new / old for old, new in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "name": name,
        "old_ms": 1e3 * statistics.median(old for old, _ in pairs),
        "new_ms": 1e3 * statistics.median(new for _, new in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "starts": [statistics.median(new / old for old, new in start) for start in starts],
    }


def to_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| row | old, ms | new, ms | new / old | quartiles | by start |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["quartiles"]
        starts = ", ".join(f"{x:.3f}" for x in r["starts"])
        lines.append(
            f"| {r['name']} | {r['old_ms']:.3f} | {r['new_ms']:.3f} | {r['ratio']:.3f} "
            f"| {low:.3f} to {high:.3f} | {starts} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
