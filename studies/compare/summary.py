"""What only studies ask of their rows: equal budgets, worth in dense neurons, differences.

Means and errors are those of `nomatmul compare`. Nothing here needs torch. A library.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any

from nomatmul.evaluate import compare_report
from nomatmul.evaluate.compare_report import of_section, timed


@dataclasses.dataclass(frozen=True)
class Entry(compare_report.Entry):
    """at_flops, at_seconds: held-out loss (nats a token) where the cheapest variant ended, see
    `equal_budgets`. worth: width of the dense layer that would score the same (nan: outside of the
    controls).
    """

    at_flops: float = math.nan
    at_seconds: float = math.nan
    worth: float = math.nan

    @property
    def control(self) -> str:
        """The variant that is a dense layer of this one's active width."""
        if self.variant.startswith("gated"):
            return f"glu-{round(self.active / 1.5)}"  # a gated neuron counts as 1.5
        return f"dense-{self.active}"


def sections(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the sections in the order of their first rows."""
    return list(dict.fromkeys(row["section"] for row in rows))


def summarise(rows: list[dict[str, Any]], section: str, *, stage: str = "final") -> list[Entry]:
    """The entries of one section, best score first."""
    mine = of_section(rows, section, stage)
    entries = [Entry(**vars(entry)) for entry in compare_report.summarise(rows, section, stage)]
    return with_worth(equal_budgets(entries, mine))


def equal_budgets(entries: list[Entry], rows: list[dict[str, Any]]) -> list[Entry]:
    """The entries with their held-out losses at equal FLOPs and at equal time.

    The budget is what the cheapest variant has used at its end: the others are read from their
    curves where they had used as much. There the learning rate of theirs had not yet come down,
    so these columns flatter the cheap variants. Time is read from runs that are `timed`.
    """
    done = [row for row in rows if row["status"] == "ok" and row.get("held_out_curve")]
    if not done:
        return entries
    flops = min(row["flops_per_token"] * row["tokens"] for row in done)
    seconds = min((row["held_out_curve"][-1][2] for row in done if timed(row)), default=math.nan)
    out = []
    for entry in entries:
        mine = [row for row in done if row["variant"] == entry.variant]
        if not mine:
            out.append(entry)
            continue
        by_flops = [loss_at_step(row, _step_of_flops(row, flops)) for row in mine]
        by_time = [_read(row["held_out_curve"], 2, seconds) for row in mine if timed(row)]
        out.append(
            dataclasses.replace(
                entry,
                at_flops=statistics.fmean(by_flops),
                at_seconds=statistics.fmean(by_time) if by_time else math.nan,
            )
        )
    return out


def _step_of_flops(row: dict[str, Any], flops: float) -> float:
    return float(flops / row["flops_per_token"] * row["steps"] / row["tokens"])


def loss_at_step(row: dict[str, Any], step: float) -> float:
    """Held-out loss of a run at a step, in a line between the looks; nan before the first."""
    return _read(row["held_out_curve"], 0, step)


def _read(curve: list[list[float]], axis: int, place: float) -> float:
    """Column 1 of the curve where column `axis` has the value `place`, in a line between points."""
    before = None
    for point in curve:
        if point[axis] >= place * (1 - 1e-9):
            if before is None:
                return point[1] if point[axis] <= place * (1 + 1e-9) else math.nan
            share = (place - before[axis]) / max(point[axis] - before[axis], 1e-12)
            return float(before[1] + min(share, 1.0) * (point[1] - before[1]))
        before = point
    return float(curve[-1][1])


def with_worth(entries: list[Entry]) -> list[Entry]:
    """Each tree variant with the width of the dense layer that would score the same.

    In a line between the dense controls over the logarithm of their width. Only widths between
    the narrowest and the widest control are named.
    """
    controls = sorted((e.neurons, e.score) for e in entries if e.kind == "dense")
    return [
        dataclasses.replace(entry, worth=_worth(entry.score, controls))
        if entry.kind == "fff"
        else entry
        for entry in entries
    ]


def _worth(score: float, controls: list[tuple[int, float]]) -> float:
    for (narrow, high), (wide, low) in itertools.pairwise(controls):
        if low <= score <= high and high > low:
            share = (high - score) / (high - low)
            return float(narrow * (wide / narrow) ** share)
    return math.nan


def difference(a: Entry, b: Entry) -> tuple[float, float | None]:
    """a.score - b.score and its standard error, None where none is known."""
    gap = a.score - b.score
    if a.error is None or b.error is None:
        return gap, None
    return gap, math.hypot(a.error, b.error)
