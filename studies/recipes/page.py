"""Tables of the recipe study from its rows, to be put into a page whose words are written by hand.

    python studies/recipes/page.py benchmarks/results/DATE-recipes/rows.jsonl [--models FOLDER]
    python studies/recipes/page.py benchmarks/results/DATE-recipes*/rows.jsonl --plot recipes.svg

--models: the folder of the MODEL.tar.gz of the same run; a packed model's bytes are read there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.gpu_common import ROOT
from nomatmul.evaluate.compare_report import table
from nomatmul.evaluate.rows import read_rows
from studies.recipes import plots

TEXTS = ("wikipedia", "novels", "stories")
SECOND = (
    *("phases", "distil", "optimiser", "structure", "longer", "combined", "teacher"),
    *("groups", "hybrids", "recurrences", "recurrence", "recurrence-again", "gains"),
    "largest",
)
DEAD_ZONE = ("zero", "stuck", "flipped", "seconds")
Row = dict[str, Any]


def clean_bits(row: Row) -> float:
    """Mean bits per byte over the cleaned held-out texts, each counted once."""
    return statistics.fmean(row[f"bpb_{text}"] for text in TEXTS)


def finished(rows: list[Row], section: str) -> list[Row]:
    return [row for row in rows if row["section"] == section and row["status"] == "ok"]


def recipe_table(rows: list[Row]) -> list[str]:
    """Each change of the first stay against `base`."""
    return change_table(finished(rows, "recipe"))


def second_table(rows: list[Row]) -> list[str]:
    """Each change of the second stay that has the base's size and tokens, with its dead zone."""
    return change_table([row for row in second(rows) if like_base(row, rows)], DEAD_ZONE)


def second(rows: list[Row]) -> list[Row]:
    return [row for section in SECOND for row in finished(rows, section)]


def like_base(row: Row, rows: list[Row]) -> bool:
    """As many parameters and tokens as the base of the second stay, to two percent?"""
    base = next((r for r in finished(rows, "phases") if r["variant"] == "base"), row)
    near = [abs(row[key] / base[key] - 1) < 0.02 for key in ("parameters", "tokens")]
    return all(near) and row["section"] != "teacher"


def changes(rows: list[Row]) -> list[tuple[list[Row], float, float, float | None]]:
    """(rows of the seeds, mean, difference to `base`, its standard error) of each variant, best
    first; [] without a base. The error comes from the seeds' spread over all variants with two."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    if "base" not in groups:
        return []
    means = {name: statistics.fmean(map(clean_bits, group)) for name, group in groups.items()}
    spread = pooled(list(groups.values()))
    found = []
    for name in sorted(groups, key=lambda name: means[name]):
        scale = (1 / len(groups[name]) + 1 / len(groups["base"])) ** 0.5
        error = spread * scale if spread and name != "base" else None
        found.append((groups[name], means[name], means[name] - means["base"], error))
    return found


def change_table(rows: list[Row], more: tuple[str, ...] = ()) -> list[str]:
    """Each variant against `base`. more: names of further fields, whose means are shown."""
    lines = []
    for group, mean, change, error in changes(rows):
        base = mean - change
        lines.append([
            group[0]["label"], len(group), f"{group[0]['learning_rate']:g}", f"{mean:.4f}",
            "-" if change == 0 else f"{change:+.4f} ({100 * change / base:+.2f} %)",
            f"{error:.4f}" if error else None,
            *(f"{statistics.fmean(r[f'bpb_{text}'] for r in group):.4f}" for text in TEXTS),
            f"{statistics.fmean(r['bpb_wikipedia-raw'] for r in group):.4f}",
            *(_mean(group, key) for key in more),
        ])  # fmt: skip
    if not lines:
        return []
    header = ["change", "seeds", "rate", "bits per byte", "against today's", "standard error",
              "Wikipedia", "novels", "stories", "Wikipedia, raw", *more]  # fmt: skip
    return table(header, lines)


def plotted(rows: list[Row]) -> list[tuple[str, float, float]]:
    """(label, percent against today's recipe, its standard error) of every change at the base's
    size and tokens; each part of the study against its own base."""
    parts = (
        finished(rows, "recipe"),
        [row for row in second(rows) if like_base(row, rows)],
    )
    return [
        (group[0]["label"], 100 * change / (mean - change), 100 * error / (mean - change))
        for part in parts
        for group, mean, change, error in changes(part)
        if error
    ]


def _mean(group: list[Row], key: str) -> str | None:
    values = [row[key] for row in group if key in row]
    return f"{statistics.fmean(values):.4g}" if values else None


def pooled(groups: list[list[Row]]) -> float | None:
    """Standard deviation of one run, from all groups with several seeds."""
    squares = [
        (clean_bits(row) - statistics.fmean(map(clean_bits, group))) ** 2
        for group in groups
        if len(group) > 1
        for row in group
    ]
    freedom = len(squares) - sum(len(group) > 1 for group in groups)
    return (sum(squares) / freedom) ** 0.5 if freedom else None


def pareto_table(rows: list[Row], packed: dict[str, int]) -> list[str]:
    """File bytes and bits per byte: packed models, and the twin in every form."""
    lines = []
    for row in finished(rows, "quantised"):
        form = [row["label"], row["stage"]]
        lines.append((row["file_bytes"], [*form, *bits(row)]))
    for row in finished(rows, "pareto") + finished(rows, "box12"):
        name = f"{row['section']}-{row['variant']}"
        if name in packed:
            lines.append((packed[name], [row["label"], "packed, 1.6 bits", *bits(row)]))
    header = ["model", "form", "MB", "bits per byte", "Wikipedia", "novels", "stories"]
    ordered = sorted(lines, key=lambda line: line[0])
    return table(header, [[*line[:2], f"{size / 1e6:.2f}", *line[2:]] for size, line in ordered])


def bits(row: Row) -> list[str]:
    return [f"{clean_bits(row):.4f}", *(f"{row[f'bpb_{text}']:.4f}" for text in TEXTS)]


def runs_table(runs: list[Row]) -> list[str]:
    """Every run as it was measured. tokens/s is shared by the lanes of the row."""
    lines = [
        [
            row["label"], row["seed"], f"{row['learning_rate']:g}",
            f"{row['parameters'] / 1e6:.2f}M", f"{row['tokens'] / 1e6:.1f}M", *bits(row),
            f"{row['tokens_per_second']:,}",
            row["lanes"], row["commit"],
        ]
        for row in runs
    ]  # fmt: skip
    header = ["run", "seed", "rate", "parameters", "tokens", "bits per byte", "Wikipedia", "novels",
              "stories", "tokens/s", "lanes", "commit"]  # fmt: skip
    return table(header, lines)


def others(rows: list[Row]) -> list[Row]:
    """Runs of the second stay with other sizes or tokens, among the Pareto models: by size."""
    runs = [row for row in second(rows) if not like_base(row, rows)]
    if not runs:
        return []
    key = ("parameters", "tokens")
    return sorted(
        finished(rows, "pareto") + runs,
        key=lambda row: ([round(row[k], -6) for k in key], clean_bits(row)),
    )


def packed_bytes(folder: Path | None) -> dict[str, int]:
    """{section-variant: bytes of its model.safetensors} of the packed models in a folder."""
    sizes = {}
    for file in sorted(folder.glob("*.tar.gz")) if folder else []:
        with tarfile.open(file) as archive:
            for member in archive.getmembers():
                name = member.name.split("/")[0]
                packed = "transformer" not in name  # the twin's own bytes stand in its rows
                if member.name.endswith("model.safetensors") and packed:
                    sizes[name] = member.size
    return sizes


def page(rows: list[Row], packed: dict[str, int]) -> str:
    parts = {
        "One change at a time": recipe_table(rows),
        "File size and quality": pareto_table(rows, packed),
        "Runs of the Pareto models": runs_table(finished(rows, "pareto")),
        "Shapes of at most 12 MB": runs_table(finished(rows, "box12")),
        "Training that changes on its way": second_table(rows),
        "Other sizes and lengths": runs_table(others(rows)),
    }
    return "\n".join(f"## {title}\n\n" + "\n".join(t) + "\n" for title, t in parts.items() if t[2:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="*", help="later files may repeat earlier rows")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the rows into this .svg")
    parser.add_argument("--tiny", action="store_true", help="dry run: the newest rows kept here")
    args = parser.parse_args(argv)
    if args.tiny:
        results = ROOT / "benchmarks/results"
        args.rows = args.rows or [max(results.glob("*-recipes")) / "rows.jsonl"]
    if not args.rows:
        parser.error("the files of rows are needed")
    rows = [row for file in args.rows for row in read_rows(file)]
    unique = list({repr(row): row for row in rows}.values())
    print(page(unique, packed_bytes(args.models)))
    if args.plot:
        plots.draw(unique, plotted(unique), args.plot)


if __name__ == "__main__":
    main()
