"""Union models (MLGRU with ternary trees) against the plain MatMul-free LM of as many parameters.

The 370M shape with random weights: its GLU, trees of several depths with as many rows, no channel
mixer at all (what the rest of the model costs). All models lie in one process and take turns, a few
steps each; a ratio is the median over rounds of the GLU's time over the other's in the same round.

    python benchmarks/union_cpu.py                    # about 4 minutes; writes benchmarks/results
    python benchmarks/union_cpu.py --seconds 20 --layers 4 --out /tmp/x      # a look
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary

from nomatmul.engine import random_model
from nomatmul.engine.language_model import LanguageModel
from nomatmul.evaluate.speed import SIZES, bytes_read_per_token
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig

RESULTS = Path(__file__).resolve().parent / "results"
# trees, depth: 4224 rows have the parameters of the GLU; the first has half of them
SHAPES = ((64, 4), (136, 4), (281, 3), (67, 5), (16, 7), (1, 11))
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
PROMPT, BATCH, STEPS = 256, 16, 4
PHASES = {"decode": "decode", "batch": f"{BATCH} sequences", "prefill": f"prefill of {PROMPT}"}


def configs(layers: int, tiny: bool = False) -> dict[str, ModelConfig]:
    """{label: config} of all contenders, the GLU first."""
    sizes = {**SIZES["370M"], **(TINY if tiny else {}), "num_layers": layers}
    found = {"GLU (MatMul-free LM)": ModelConfig(**sizes)}
    for trees, depth in SHAPES:
        found[f"FFF {trees}x{depth}"] = ModelConfig(
            **sizes, channel_mixer="fff", activation="silu", fff_trees=trees, fff_depth=depth
        )
    found["no channel mixer"] = ModelConfig(**sizes, channel_mixer="none")
    return found


class Runner:
    """One model behind some threads: seconds of a phase, always with other tokens."""

    def __init__(self, lm: LanguageModel, threads: int) -> None:
        self.lm = lm.with_threads(threads)
        self.session = self.lm.session()
        self.sessions = [self.lm.session() for _ in range(BATCH)]
        self.count = 0

    def ids(self, count: int) -> list[int]:
        """The next token ids of a fixed pseudo-random sequence."""
        start, self.count = self.count, self.count + count
        return [(7919 * n * n + 104729 * n) % self.lm.config.vocab_size
                for n in range(start, start + count)]  # fmt: skip

    def seconds(self, phase: str) -> float:
        """Seconds a token of one turn."""
        if phase == "decode":
            work = [[token] for token in self.ids(STEPS)]
            start = time.perf_counter()
            for ids in work:
                self.session.append(ids)
            return (time.perf_counter() - start) / STEPS
        if phase == "batch":
            parts = [[token] for token in self.ids(BATCH)]
            start = time.perf_counter()
            self.lm.step(self.sessions, parts)
            return (time.perf_counter() - start) / BATCH
        session, prompt = self.lm.session(), self.ids(PROMPT)
        start = time.perf_counter()
        session.append(prompt)
        return (time.perf_counter() - start) / PROMPT


def measure(
    models: dict[str, LanguageModel], threads: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """{label: {phase: seconds a token, one figure a round}}; at least two rounds."""
    runners = {label: Runner(lm, threads) for label, lm in models.items()}
    found: dict[str, dict[str, list[float]]] = {
        label: {phase: [] for phase in PHASES} for label in runners
    }
    for runner in runners.values():
        runner.session.append(runner.ids(16))
        runner.seconds("batch")
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 2 or time.perf_counter() < end:
        for phase in PHASES:
            if phase == "prefill" and rounds % 4 != 1:  # one takes as long as many steps
                continue
            for label, runner in runners.items():
                found[label][phase].append(runner.seconds(phase))
        rounds += 1
    return found


def row_of(
    label: str, lm: LanguageModel, threads: int, found: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """One line of the result."""
    first = next(iter(found))
    parts, trees = lm.footprint(), next(iter(architecture_of(lm.config).trees().values()), None)
    row: dict[str, Any] = {
        "model": label,
        "threads": threads,
        "parameters": lm.config.param_count(),
        "active_rows": trees.active_rows if trees is not None else 0,
        "rows": trees.rows if trees is not None else 0,
        "core_bytes": parts["core"],
        "weights_bytes": parts["weights"],
        "read_per_token_bytes": bytes_read_per_token(lm),
    }
    for phase in PHASES:
        pairs = zip(found[first][phase], found[label][phase], strict=True)
        row[phase] = {
            "tokens_per_second": 1 / median(found[label][phase]),
            "times_glu": median(a / b for a, b in pairs),
            "rounds": len(found[label][phase]),
        }
    return row


def page(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = document["machine"]
    lines = [
        f"# Union models on a CPU, {about['date']}, {about['cpu']}",
        "",
        f"{about['cores']} cores usable, load average {about['load_average']:.1f} at the start,"
        f" commit {about['commit']}, {document['isa']}, {document['seconds']:.0f} s.",
        "",
        f"{document['layers']} layers.",
        "[How it was measured](README.md#union-models-on-a-cpu-union_cpupy)",
    ]
    for threads in sorted({row["threads"] for row in document["rows"]}):
        rows = [row for row in document["rows"] if row["threads"] == threads]
        lines += ["", f"## {threads} thread{'s' if threads > 1 else ''}", ""]
        lines += [f"| | M parameters | active rows | weights MB | read MB | "
                  f"{' | '.join(PHASES.values())} |"]  # fmt: skip
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
        for row in rows:
            rates = [
                f"{row[p]['tokens_per_second']:.0f} ({row[p]['times_glu']:.2f}x)" for p in PHASES
            ]
            active = f"{row['active_rows']} of {row['rows']}" if row["rows"] else ""
            sizes = [row["weights_bytes"] / 1e6, row["read_per_token_bytes"] / 1e6]
            cells = [row["model"], f"{row['parameters'] / 1e6:.0f}", active]
            lines += [f"| {' | '.join([*cells, *(f'{size:.1f}' for size in sizes), *rates])} |"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200, help="of measuring, all threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=SIZES["370M"]["num_layers"])
    parser.add_argument("--name", default="", help="of the machine, in the file names")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, seconds=0.1, threads=[1], layers=1, out=None)
        options.out = options.out or temporary()
    start, about = time.perf_counter(), report.machine(options.name)
    models = {
        label: random_model(config, threads=1)
        for label, config in configs(options.layers, options.tiny).items()
    }
    rows = []
    for threads in options.threads:
        found = measure(models, threads, options.seconds / len(options.threads))
        rows += [row_of(label, lm, threads, found) for label, lm in models.items()]
    document = {
        "machine": about,
        "isa": next(iter(models.values())).backend.isa,
        "layers": options.layers,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{about['date']}-union-cpu-{about['name']}"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    stem.with_suffix(".md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
