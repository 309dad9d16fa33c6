"""The rows of gpu_tests.py and the table made of them.

A library. The file is JSON lines, written as things happen: what was collected, when a case began,
how it ended. A run that was killed leaves a file that tells as much as it knew.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from gpu_common import describe

from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows

FATES = ("passed", "failed", "skipped", "not_run")
Row = dict[str, Any]


@dataclasses.dataclass
class Test:
    """All cases of one test function."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    not_run: int = 0
    seconds: float = 0.0
    cases: list[str] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)


def ends(rows: list[Row]) -> dict[str, Row]:
    """{case: its last row}, in the order of collection; what has no end yet is not_run."""
    found: dict[str, Row] = {}
    for row in rows:
        for case in row.get("collected", ()):
            found.setdefault(case, {"outcome": "not_run"})
        if "begun" in row:
            why = {"outcome": "not_run", "reason": "cut: it was running when the run ended"}
            if found.get(row["begun"], why)["outcome"] == "not_run":
                found[row["begun"]] = why
        if "case" in row:
            found[row["case"]] = row
    return found


def by_test(rows: list[Row]) -> dict[str, Test]:
    """The cases added up, a test function each."""
    tests: dict[str, Test] = collections.defaultdict(Test)
    for case, row in ends(rows).items():
        name, _, dials = case.partition("[")
        dials, test = dials.rstrip("]"), tests[name]
        setattr(test, row["outcome"], getattr(test, row["outcome"]) + 1)
        test.seconds += row.get("seconds", 0.0)
        if dials:
            test.cases.append(dials)
        if reason := row.get("reason"):
            skipped = row["outcome"] == "skipped" or not dials
            test.reasons.append(reason if skipped else f"{dials}: {reason}")
    return dict(sorted(tests.items()))


def counts(tests: dict[str, Test]) -> dict[str, int]:
    return {fate: sum(getattr(test, fate) for test in tests.values()) for fate in FATES}


def line(rows: list[Row]) -> str:
    """The state of a run in one line."""
    count = counts(by_test(rows))
    words = [f"{number} {fate.replace('_', ' ')}" for fate, number in count.items()]
    return f"{sum(count.values())} cases: {', '.join(words)}"


def _shorten(texts: list[str], length: int = 90) -> str:
    text = re.sub(r"\s+", " ", ", ".join(dict.fromkeys(texts)).replace("|", "/"))
    return text if len(text) <= length else text[: length - 1] + "…"


def page(rows: list[Row], tests: dict[str, Test]) -> str:
    """The table, and under it why cases failed, were skipped or not run."""
    body = []
    for name, test in tests.items():
        fates = [getattr(test, fate) for fate in FATES]
        cells = [f"`{name.removeprefix('tests/')}`", sum(fates), _shorten(test.cases) or None]
        body.append([*cells, *fates, f"{test.seconds:.1f}"])
    fates = list(counts(tests).values())
    seconds = sum(test.seconds for test in tests.values())
    body.append(["**all**", sum(fates), None, *fates, f"{seconds:.1f}"])
    machines = dict.fromkeys(describe(row["machine"]) for row in rows if "machine" in row)
    about = "; ".join(machines) or "the run ended before it had looked at the machine"
    took = [row["took"] for row in rows if "took" in row]
    if took:
        about += f"; {sum(took):.0f} s in all, several cases side by side"
    header = ["test", "cases", "shapes and dials", *(f.replace("_", " ") for f in FATES), "seconds"]
    lines = ["# GPU tests", "", about + ".", "", *table(header, body)]
    notes = [(name, test.reasons) for name, test in tests.items() if test.reasons]
    if notes:
        lines += ["", "Why cases failed, were skipped or not run:", ""]
        lines += [f"- `{name}`: {_shorten(reasons, 400)}" for name, reasons in notes]
    return "\n".join(lines) + "\n"


def write(out: Path) -> dict[str, int]:
    """gpu-tests.md and gpu-tests.json from gpu-tests-rows.jsonl in `out`; prints the table.

    Returns how many cases had each fate.
    """
    rows = read_rows(out / "gpu-tests-rows.jsonl")
    tests = by_test(rows)
    text = page(rows, tests)
    machine = next((row["machine"] for row in reversed(rows) if "machine" in row), None)
    document = {"machine": machine, "tests": {n: dataclasses.asdict(t) for n, t in tests.items()}}
    (out / "gpu-tests.md").write_text(text, "utf-8")
    (out / "gpu-tests.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text, flush=True)
    return counts(tests)
