"""Table and plot of the Pareto models: bits per byte against bytes, memory, speed and energy.

A library of pareto.py. Bits per byte are those of the recipe study's rows (one seed, mean of three
held-out texts): sizes S, M, L after 80M tokens, today's recipe; the size of the box after 330M
tokens, each side's best recipe, without a twin of equal bytes. A model in a form has the speed and
memory of the engine that decodes it fastest.

Energy is an ESTIMATE: the bytes that a token reads, from DDR4 at the picojoules that the
accelerator's report assumes, and its products and sums at those of Horowitz, ISSCC 2014 (45 nm).
What instructions, caches and an idle machine draw is left out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_report import table
from nomatmul.hardware.energy import MEMORY_PJ_PER_BIT
from nomatmul.train.curve import open_pyplot

RESULTS = Path(__file__).parent / "results"
SCORES = [RESULTS / f"2026-11-30-recipes{part}/rows.jsonl" for part in ("", "-largest")]
# of the box's size: the study's names of the two best recipes
LARGEST = {"dense-30-gains": "mlgru-box", "twin-gains": "transformer-box"}
TEXTS = ("wikipedia", "novels", "stories")
LONGEST = 1024  # tokens of a sequence whose state is stated
# picojoules of a product and a sum, Horowitz, ISSCC 2014 (45 nm): an int8 product and an int32 sum;
# a 16-bit product and a float32 sum. A ternary weight is a sum.
OPERATION_PJ = {"ternary": 0.1, "int": 0.2 + 0.1, "float": 1.1 + 0.9}
# how the twin was rounded: the forms that run it, and what their products are
RUN_BY = {
    "bf16": (("bf16", "f16", "BF16", "F16"), "float"),
    "int8": (("int8", "int8-32", "Q8_0"), "int"),
    "int4 groups of 32": (("Q4_0",), "int"),
    "int4 groups of 32, GPTQ": (("Q4_0",), "int"),
    "int4 groups of 128": (("Q4_0",), "int"),
    "int4 groups of 128, GPTQ": (("Q4_0",), "int"),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A model in a form of its file. bits: a byte of held-out text; alone, rotated: tokens/s with
    weights in the cache and out of it; memory: bytes that loading and a sequence of 960 tokens add;
    state: bytes of one sequence of 1,024 tokens; moved: bytes that a token reads and writes; joules
    a token."""

    model: str
    size: str
    form: str
    bits: float
    file: int
    engine: str
    alone: float
    rotated: float
    prompt: float
    memory: int
    state: int
    moved: float
    joules: float
    best: bool = False  # trained with the best recipe of its side, else with today's

    @property
    def name(self) -> str:
        recipe = ", best recipe" if self.best else ""
        return f"{'MLGRU' if self.model == 'mlgru' else 'Transformer++'} {self.size}{recipe}"


def points(rows: Sequence[Row], scores: Sequence[Row]) -> list[Point]:
    """One for each measured form whose bits are known, by file size."""
    found = []
    for score in scores:
        name = score["variant"]
        model, _, size = LARGEST.get(name, name.removesuffix("-best")).partition("-")
        trained = score["section"] in ("pareto", "largest") and score["status"] == "ok"
        if trained and model == "mlgru":
            forms = {"packed, 2 bits": (("2bit",), "ternary")}
            forms["packed, 1.6 bits"] = (("1.6bit",), "ternary")
        elif score["section"] == "quantised" and score["stage"] in RUN_BY:
            forms = {score["stage"]: RUN_BY[score["stage"]]}
        else:
            continue
        for form, (runs, kind) in forms.items():
            ways = [r for r in rows if (r["model"], r["size"]) == (model, size)]
            ways = [r for r in ways if r["form"] in runs]
            if ways:
                row = max(ways, key=lambda row: middle(row, f"alone@{_context(row)}"))
                point = _point(score, form, kind, row)
                found.append(dataclasses.replace(point, best=name.endswith("-best")))
    return sorted(found, key=lambda point: point.file)


def _point(score: Row, form: str, kind: str, row: Row) -> Point:
    context, layers, width = _context(row), row["layers"], row["width"]
    ours = row["model"] == "mlgru"
    step = 4 * layers * width  # bytes: a float32 state, or a token's float16 keys and values
    moved = row["read_bytes"] + (2 * step if ours else (context + 1) * step)
    per_value = {"ternary": 0.25, "int": 1.0, "float": 2.0}[kind]
    if row["form"] == "Q4_0":
        per_value = 4.5 / 8
    weights = row["read_bytes"] / per_value
    picojoules = 8 * moved * MEMORY_PJ_PER_BIT["ddr4"] + weights * OPERATION_PJ[kind]
    if not ours:
        picojoules += 2 * context * layers * width * OPERATION_PJ["float"]
    return Point(
        row["model"], row["size"], form,
        statistics.fmean(score[f"bpb_{text}"] for text in TEXTS),
        row["file_bytes"] if ours else score["file_bytes"],
        f"{row['engine']} {row['form']}",
        middle(row, f"alone@{context}"), middle(row, f"rotated@{context}"),
        statistics.median(row["prefill"]), row["resident_added"],
        step if ours else LONGEST * step, moved, 1e-12 * picojoules,
    )  # fmt: skip


def _context(row: Row) -> int:
    """Behind how many tokens speed and energy are stated: the longest that was measured."""
    return max(int(key.split("@")[1]) for key in row if key.startswith("alone@"))


def middle(row: Row, key: str) -> float:
    return float(statistics.median(row[key]))


def page(found: Sequence[Point]) -> str:
    """The table of every point."""
    lines = [
        [
            point.name, point.form, f"{point.file / 1e6:.2f}", f"{point.bits:.3f}",
            f"{point.alone:,.0f}", f"{point.rotated:,.0f}", f"{point.prompt:,.0f}",
            f"{point.memory / 1e6:.1f}", f"{point.state / 1e6:.3g}", f"{point.moved / 1e6:.2f}",
            f"{1e3 * point.joules:.2f}", point.engine,
        ]
        for point in found
    ]  # fmt: skip
    header = ["model", "form", "file MB", "bits per byte", "decode in the cache, tokens/s",
              "out of the cache", "prompt, tokens/s", "memory added, MB", "state, MB",
              "MB moved a token", "energy a token, mJ (estimate)", "run by"]  # fmt: skip
    return "\n".join(table(header, lines)) + "\n"


def ways(rows: Sequence[Row]) -> str:
    """The table of every form in every engine, with the middle half of its turns."""
    lines = []
    for row in rows:
        keys = [key for key in row if key.startswith(("alone@", "rotated@"))]
        cells = [f"{middle(row, key):,.0f} ({_spread(row[key])})" for key in sorted(keys)]
        lines.append([row["size"], row["model"], row["engine"], row["form"], *cells,
                      f"{statistics.median(row['prefill']):,.0f}", row["copies"],
                      f"{row['resident_added'] / 1e6:.1f}",
                      f"{row['peak_resident'] / 1e6:.0f}"])  # fmt: skip
    names = [key.replace("@", " behind ") for key in sorted(keys)] if rows else []
    header = ["size", "model", "engine", "form", *names, "prompt", "copies in rotation",
              "memory added, MB", "peak of the process, MB"]  # fmt: skip
    return "\n".join(table(header, lines)) + "\n"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one turn"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:,.0f} to {high:,.0f}"


def write(folder: Path, rows: Sequence[Row], scores: Sequence[Row], about: Row) -> str:
    """Write FOLDER/tables.md and, where matplotlib is installed, pareto.svg; returns the tables.

    about: the machine, as pareto.py keeps it.
    """
    found = points(rows, scores)
    box = [point for point in found if point.size == "box"]
    found = [point for point in found if point.size != "box"]
    tables = {
        "80M tokens": page(found),
        "The size of the box, 330M tokens": page(box) if box else "",
        "Every form in every engine": ways(rows),
    }
    loads = ", ".join(f"{load:.1f}" for load in about["load_averages"])
    text = (
        f"# Packed MatMul-free models beside their twin, {about['date']}, {about['cpu']}\n\n"
        f"`benchmarks/pareto.py`, commit {about['commit']}, llama-cpp-python"
        f" {about['llama_cpp_python']}, one thread; load average {loads}, from size to size."
        " [How it was measured](../README.md#equal-bytes-paretopy)\n\n"
    )
    text += "\n".join(f"## {title}\n\n{table}" for title, table in tables.items() if table)
    (folder / "tables.md").write_text(text, "utf-8")
    draw(found, folder / "pareto.svg")
    return text


AXES = (  # unit, value, title, ticks
    ("MB", lambda point: point.file / 1e6, "file of the weights", (4, 8, 16, 32, 64)),
    ("MB", lambda point: point.memory / 1e6, "memory, sequence of 960 tokens", (8, 16, 32, 64)),
    ("tokens/s", lambda point: point.rotated, "one thread, behind 512 tokens, out of cache",
     (500, 1000, 2000, 4000)),
    ("mJ", lambda point: 1e3 * point.joules, "energy a token, ESTIMATE", (0.5, 1, 2, 4, 8, 16)),
)  # fmt: skip
KINDS = (
    ("MLGRU, packed", "o", "C0", lambda point: point.model == "mlgru"),
    ("Transformer++, 4 bits", "v", "C1", lambda point: point.form.startswith("int4")),
    ("Transformer++, int8", "s", "C2", lambda point: point.form == "int8"),
    ("Transformer++, bf16", "D", "C3", lambda point: point.form == "bf16"),
)


def draw(found: Sequence[Point], path: Path) -> None:
    """Bits per byte against each cost; lower is better, left too, but for tokens/s."""
    plt = open_pyplot()
    if plt is None or not found:
        return
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pareto", "font.size": 8})
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True)
    for axis, (unit, value, title, ticks) in zip(axes, AXES, strict=True):
        for label, marker, color, belongs in KINDS:
            for best in (False, True):  # hollow: the best recipe of its side
                chosen = [point for point in found if belongs(point) and point.best == best]
                axis.plot([value(point) for point in chosen], [point.bits for point in chosen],
                          marker, label=None if best else label, markersize=4, alpha=0.8,
                          color=color, fillstyle="none" if best else "full")  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlabel(unit)
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte, held out")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
