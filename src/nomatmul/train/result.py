"""How a run ended, as the caller of `run` is told."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

from nomatmul.train.curve import draw_curve
from nomatmul.train.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended. status: "finished", "stopped" (SIGTERM) or "interrupted" (Ctrl-C).

    model: the exported model's directory once finished. valid_loss in nats a token (of an encoder a
    hidden token).
    """

    status: str
    step: int
    elapsed: float
    model: str | None = None
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None
    valid_accuracy: float | None = None  # of an encoder
    curve: str | None = None  # picture of the losses, where matplotlib is installed


def stopped(number: int, step: int, elapsed: float) -> RunResult:
    """Of a run that the signal `number` ended."""
    status = "interrupted" if number == signal.SIGINT else "stopped"
    return RunResult(status, step, elapsed)


def finished(step: int, elapsed: float, model: Path, out: Path | None) -> RunResult:
    """Of a run that came to its end; draws its curve.

    out: the run's directory, None at ranks that do not own its metrics.
    """
    last, curve = dict[str, float](), None
    if out is not None:
        curve = draw_curve(out)
        for row in read_metrics(out):
            last = row if "valid_loss" in row else last
    return RunResult(
        "finished",
        step,
        elapsed,
        str(model),
        last.get("valid_loss"),
        last.get("valid_bits_per_byte"),
        last.get("valid_accuracy"),
        None if curve is None else str(curve),
    )
