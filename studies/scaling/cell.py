"""One cell of the scaling study: all runs of one architecture at one size, in one process.

Started by run.py; --tiny prepares invented texts and trains a toy cell by itself. Training is
`nomatmul compare`'s own: the model is compiled once, every run
draws new weights into it. Tunes the learning rate on a short budget, then trains the final runs at
the best rate. A run that would not end before the deadline is not started; one that is overtaken
by it is reported as cut.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.dry_run import add_tiny
from benchmarks.gpu_common import count_parameters
from nomatmul.evaluate.flops import training_flops
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.ops import choose
from nomatmul.ops.bitlinear import TernaryCache, ternary_cache
from nomatmul.train.config import TrainConfig
from nomatmul.train.plan import runs_fused
from studies.compare.cell import CellTrainer
from studies.compare.plan import Cell as Comparison
from studies.scaling.plan import best_rate, beyond, cells, find_run, step_count


@dataclasses.dataclass(frozen=True)
class Cell:
    """What run.py asks for; see its `plan`."""

    arch: str
    size: str
    model: dict[str, Any]
    rates: list[float]
    tune_tokens: int
    final_tokens: int
    seeds: list[int]
    sequence_length: int
    batch_size: int
    warmup_steps: int
    eval_tokens: int  # of each held-out text
    tune: bool  # False: the best rate is read from earlier rows
    stage: str  # of the runs after tuning: final, or check (one again, with other kernels)
    commit: str
    work: str
    rows: str
    device: str
    compile: str
    deadline: float  # seconds since the epoch


def log(cell: Cell, text: str) -> None:
    print(f"[{cell.arch} {cell.size}] {text}", flush=True)


class Bench:
    """A compiled model of the cell's shape and the token streams on its device."""

    def __init__(self, cell: Cell, ternary: TernaryCache) -> None:
        self.cell = cell
        self.trainer = CellTrainer(comparison(cell), ternary, lambda text: log(cell, text))

    @property
    def speed(self) -> float:
        """Tokens a second of the last run."""
        return self.trainer.speed

    def steps(self, tokens: int) -> int:
        return step_count(vars(self.cell), tokens, len(self.trainer.texts.train))

    def run(self, stage: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        """Train from new weights on `tokens` tokens (one epoch at most), then score; a row.

        The seed draws the weights and the order of the tokens, alike for both architectures.
        """
        trainer = self.trainer
        config = dataclasses.replace(
            trainer.config, learning_rate=rate, steps=self.steps(tokens), seed=seed
        )
        run = trainer.train(config)
        counts = count_parameters(trainer.model)
        seen = run.step * config.tokens_per_step
        curve = [[step, loss] for step, loss, _ in run.curve]
        scores = trainer.score(self.cell.eval_tokens) if run.status == "ok" else {}
        return {
            "arch": self.cell.arch,
            "size": self.cell.size,
            "stage": stage,
            "status": run.status,
            "learning_rate": rate,
            "seed": seed,
            "steps": run.step,
            "tokens": seen,
            **counts,
            "flops": training_flops(config.model, config.sequence_length) * seen,
            "seconds": round(run.took, 2),
            "tokens_per_second": round(trainer.speed),
            "compiled": trainer.compiled,
            "ops": os.environ.get("NOMATMUL_OPS", ""),
            "fallback": choose.fallback_reason(),
            "fused": runs_fused(config.model, trainer.plan),
            "commit": self.cell.commit,
            "curve": curve[:: max(len(curve) // 25, 1)],
            **{name: value for name, value in scores.items() if name.startswith("bpb")},
        }


def comparison(cell: Cell) -> Comparison:
    """The cell as `nomatmul compare` trains one; rates, steps and seeds come with each run."""
    config = TrainConfig(
        recipe=f"scaling-{cell.arch}-{cell.size}",
        model=ModelConfig.from_dict(cell.model),
        sequence_length=cell.sequence_length,
        batch_size=cell.batch_size,
        micro_batch_size=cell.batch_size,
        schedule="cosine",
        warmup_steps=cell.warmup_steps,
    )
    work = Path(cell.work)
    held = {path.name.removeprefix("valid-"): str(path) for path in sorted(work.glob("valid-*"))}
    return Comparison(
        section="scaling",
        variant=f"{cell.arch}-{cell.size}",
        label=f"{cell.arch} {cell.size}",
        config=config.to_dict(),
        seeds=tuple(cell.seeds),
        neurons=0,
        active=0,
        train=(str(work / "train"),),
        valid=held,
        rows=cell.rows,
        eval_tokens=cell.eval_tokens,
        eval_points=0,
        device=cell.device,
        compile=cell.compile,
        deadline=cell.deadline,
        commit=cell.commit,
    )


def run_cell(cell: Cell, wait: Callable[[], object]) -> None:
    """Tune, then the final runs, with ternary weights made once a step as the trainer does.

    wait: called when all is compiled, before the first run.
    """
    file = Path(cell.rows)
    with ternary_cache() as cache:
        bench = Bench(cell, cache)
        wait()
        run_stages(cell, bench, file)


def run_stages(cell: Cell, bench: Bench, file: Path) -> None:
    """Every run is a row of the file as soon as it ends."""

    plan = vars(cell)

    def attempt(stage: str, rate: float, seed: int, tokens: int) -> dict[str, Any] | None:
        earlier = find_run(read_rows(file), plan, stage, rate, seed, bench.steps(tokens))
        if earlier is not None:
            return earlier
        expected = tokens / bench.speed if bench.speed else 0.0
        if time.time() + 1.05 * expected > cell.deadline:
            log(cell, f"{stage} at {rate:g}, seed {seed}: no time left, not started")
            return None
        row = bench.run(stage, rate, seed, tokens)
        append_row(file, row)
        shown = f"{row['bpb']:.4f} bits per byte" if "bpb" in row else row["status"]
        log(
            cell,
            f"{stage} rate {rate:g} seed {seed}: {shown}, {row['tokens'] / 1e6:.1f}M tokens, "
            f"{row['tokens_per_second']:,} tokens/s, {cell.deadline - time.time():.0f} s left",
        )
        return row

    if cell.tune:
        tried = list(cell.rates)
        for rate in tried:
            attempt("tune", rate, 0, cell.tune_tokens)
        further = beyond(plan, best_rate(read_rows(file), plan, bench.steps(cell.tune_tokens)))
        if further is not None:
            attempt("tune", further, 0, cell.tune_tokens)
    best = best_rate(read_rows(file), plan, bench.steps(cell.tune_tokens))
    if best is None:
        log(cell, "no tuning run ended: no final run")
        return
    for seed in cell.seeds:
        attempt(cell.stage, best, seed, cell.final_tokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell", nargs="?", help="the cell as JSON")
    parser.add_argument("--out", type=Path, help="with --tiny: folder of texts, tokens and rows")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        return run_cell(toy(args.out), lambda: None)
    if args.cell is None:
        parser.error("a cell is needed")
    cell = Cell(**json.loads(args.cell))
    if cell.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run_cell(cell, sys.stdin.readline)  # ready: run.py says when it is this cell's turn


def toy(out: Path | None) -> Cell:
    """The first cell of run.py's dry run, its texts prepared."""
    from studies.scaling import run

    args = run.parse(["prepare", "--tiny", *(["--out", str(out)] if out else [])])
    run.prepare(args)
    values = {**cells(args)[0], "tune": True, "device": "cpu", "deadline": time.time() + 600}
    return Cell(**values)


if __name__ == "__main__":
    main()
