"""What the rows of a comparison say: means over seeds, equal budgets, worth in dense neurons.

Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant of a section, all its finished seeds together.

    score: held-out bits per byte of a causal model, nats a guessed token of an encoder; lower is
    better. error: standard error of the mean, from the spread of seeds pooled over all variants of
    the section (two seeds of one variant alone would give a very rough one); None if no variant has
    two. at_flops, at_seconds: held-out
    loss (nats a token) where the cheapest variant ended, see `equal_budgets`. worth: width of the
    dense layer that would score the same (nan: outside of the controls).
    """

    section: str
    variant: str
    label: str
    metric: str
    score: float
    error: float | None
    values: tuple[float, ...]
    tokens: int
    parameters: int
    neurons: int
    active: int
    flops_per_token: float
    flops_masked_per_token: float
    tokens_per_second: float
    learning_rate: float
    diverged: int = 0
    at_flops: float = math.nan
    at_seconds: float = math.nan
    worth: float = math.nan

    @property
    def kind(self) -> str:
        """dense (a control of some width, gated or not), none or fff (trees of either neurons)."""
        first = self.variant.split("-")[0]
        return {"glu": "dense", "gated": "fff"}.get(first, first)

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
    """The entries of one section, best score first.

    Where a variant has runs of several lengths, the one with most runs counts (the longer one of
    two): short trials must not mix with the study.
    """
    mine = [r for r in rows if (r["section"], r["stage"]) == (section, stage)]
    length = _usual([r["steps_planned"] for r in mine if r["status"] == "ok"])
    mine = [r for r in mine if r["steps_planned"] == length]
    entries: list[Entry] = []
    for variant in dict.fromkeys(row["variant"] for row in mine):
        of_variant = [row for row in mine if row["variant"] == variant]
        done = [row for row in of_variant if row["status"] == "ok"]
        if done:
            diverged = sum(row["status"] == "diverged" for row in of_variant)
            entries.append(_entry(done, diverged))
    entries = equal_budgets(with_errors(entries), mine)
    return sorted(with_worth(entries), key=lambda entry: entry.score)


def _usual(lengths: list[int]) -> int:
    return max(set(lengths), key=lambda n: (lengths.count(n), n)) if lengths else 0


def _entry(rows: list[dict[str, Any]], diverged: int) -> Entry:
    first = rows[0]
    metric = "bpb" if "bpb" in first else "loss"
    # The same seed twice (other kernels, another machine) is one seed.
    values = list({row["seed"]: float(row[metric]) for row in rows}.values())
    return Entry(
        section=first["section"],
        variant=first["variant"],
        label=first["label"],
        metric=metric,
        score=statistics.fmean(values),
        error=None,
        values=tuple(values),
        tokens=first["tokens"],
        parameters=first["parameters"],
        neurons=first["neurons"],
        active=first["active"],
        flops_per_token=first["flops_per_token"],
        flops_masked_per_token=first["flops_masked_per_token"],
        tokens_per_second=_mean([row["tokens_per_second"] for row in rows if timed(row)]),
        learning_rate=first["learning_rate"],
        diverged=diverged,
    )


def timed(row: dict[str, Any]) -> bool:
    """Do the seconds of this run compare with others'? Not if it shared its device with more."""
    return bool(row.get("timed", True))


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def with_errors(entries: list[Entry]) -> list[Entry]:
    """The entries with their standard errors: the seeds' pooled deviation over sqrt(seeds)."""
    degrees = sum(len(e.values) - 1 for e in entries)
    if not degrees:
        return entries
    squares = sum(
        statistics.variance(e.values) * (len(e.values) - 1) for e in entries if len(e.values) > 1
    )
    deviation = math.sqrt(squares / degrees)
    return [dataclasses.replace(e, error=deviation / math.sqrt(len(e.values))) for e in entries]


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
                entry, at_flops=statistics.fmean(by_flops), at_seconds=_mean(by_time)
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
