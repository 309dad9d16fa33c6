"""The table of the box's encoder beside its dense twin, from the scores that encoder.py left.

    python studies/recipes/encoder_page.py benchmarks/results/2026-12-01-recipes-encoder

The folder has encoder-packed.json (hidden words, tasks of the packed models) and encoder-TASK.json
(fine-tuning); what is missing there is missing in the table. `table` fills the card, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ("wikipedia", "novels", "stories")
VARIANTS = {"trees": "trees", "dense": "dense twin"}


def read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"encoder-{name}.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"


def seeds(row: dict[str, Any]) -> str:
    """The metric of each seed, and how long one takes."""
    if "scores" not in row:
        return "not measured"
    values = [100 * next(iter(scores.values())) for scores in row["scores"]]
    return " and ".join(f"{value:.1f}" for value in values)


def tasks(folder: Path) -> list[str]:
    names = sorted(file.stem.removeprefix("encoder-") for file in folder.glob("encoder-*.json"))
    return [name for name in names if name != "packed"]


def table(folder: Path) -> str:
    """A row a score, a column a variant."""
    packed = read(folder, "packed")
    rows = [["", *VARIANTS.values()]]
    for text in TEXTS:
        cells = [packed[name]["packed"][text] for name in VARIANTS]
        shares = [f"{percent(c['accuracy'])} ({100 * c['accuracy_masks']:.1f})" for c in cells]
        rows.append([f"hidden words of {text}, packed (those shown as masks)", *shares])
    for task in tasks(folder):
        tuned = read(folder, task)
        cells = [tuned.get(name, {}) for name in VARIANTS]
        title, metric = {"cola": ("CoLA", "Matthews x 100")}.get(task, ("SST-2", "accuracy, %"))
        rows.append([f"{title}, {metric}, seeds 0 and 1, as trained", *map(seeds, cells)])
        shares = [percent(packed[name].get(task)) for name in VARIANTS]
        rows.append([f"{title}, accuracy of the better seed, packed", *shares])
        rows.append(
            [f"{title}, rate", *(f"{cell['rate']:g}" if "rate" in cell else "" for cell in cells)]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * (1 + len(VARIANTS)) + "|", *lines[1:]])


def search_table(folder: Path, task: str) -> str:
    """How each rate did on the held-out training rows."""
    found = read(folder, task)["search"]
    rates = sorted({row["rate"] for row in found})
    lines = ["| " + " | ".join(["", *(f"{rate:g}" for rate in rates)]) + " |"]
    lines.append("|---" * (1 + len(rates)) + "|")
    for name, title in VARIANTS.items():
        by = {row["rate"]: row.get("median") for row in found if row["variant"] == name}
        lines.append("| " + " | ".join([title, *(percent(by.get(rate)) for rate in rates)]) + " |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    folder = Path(words[0])
    print(table(folder))
    for task in tasks(folder):
        print(f"\nRates of {task}, one epoch of a part, on held-out training rows:\n")
        print(search_table(folder, task))


if __name__ == "__main__":
    main(sys.argv[1:])
