"""Plot the loss curves of training runs from their metrics.jsonl.

    python benchmarks/plot_training.py runs/box/mlgru runs/box/transformer --out curves.png

A run is its directory, or LABEL=DIRECTORY; without a label it is called as its directory is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dry_run import add_tiny, temporary


def read(run: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(million tokens, mean loss of 50 steps) and (million tokens, held-out bits per byte)."""
    config = json.loads((run / "run.json").read_text())["config"]
    tokens = config["batch_size"] * config["sequence_length"]
    losses: list[float] = []
    train, valid = [], []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "valid_bits_per_byte" in row:
            valid.append((row["step"] * tokens / 1e6, row["valid_bits_per_byte"]))
        elif "loss" in row:
            losses.append(row["loss"])
            if row["step"] % 50 == 0:
                train.append((row["step"] * tokens / 1e6, sum(losses) / len(losses)))
                losses.clear()
    return train, valid


def invent(run: Path) -> Path:
    """A run of 100 steps, for the dry run."""
    run.mkdir(parents=True, exist_ok=True)
    config = {"batch_size": 2, "sequence_length": 8}
    (run / "run.json").write_text(json.dumps({"config": config}))
    rows = [{"step": step, "loss": 5.0 - step / 50} for step in range(1, 101)]
    rows += [{"step": step, "valid_bits_per_byte": 2.0 - step / 100} for step in (50, 100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="[LABEL=]RUN")
    parser.add_argument("--out", type=Path, help="the picture")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        folder = args.out or temporary()
        args.runs, args.out = [f"invented={invent(folder / 'run')}"], folder / "curves.png"
    if not args.runs or args.out is None:
        parser.error("runs and --out are needed")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in args.runs:
        label, _, path = run.rpartition("=")
        train, valid = read(Path(path))
        left.plot(*zip(*train, strict=True), label=label or Path(path).name)
        right.plot(*zip(*valid, strict=True), "o-", label=label or Path(path).name)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(2.7, 5.5))
    right.set(xlabel="million tokens", ylabel="held-out bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
