"""The table of the box's encoder beside its dense twin, from the scores that encoder.py left.

    python studies/recipes/encoder_page.py benchmarks/results/2026-12-01-recipes-encoder > tables.md

The folder has encoder-packed.json (hidden words, tasks of the packed models) and encoder-TASK.json
(fine-tuning); what is missing there is missing in the table. `table` fills the card, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = {"wikipedia": "Wikipedia", "novels": "novels", "stories": "stories"}
TASKS = {"sst2": ("SST-2", "accuracy, %"), "cola": ("CoLA", "Matthews x 100")}
VARIANTS = {"trees": "trees", "dense": "dense twin"}


def read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"encoder-{name}.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"


def seeds(row: dict[str, Any]) -> str:
    """The metric of each seed."""
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
    for text, title in TEXTS.items():
        found = [packed[name]["packed"][text] for name in VARIANTS]
        shares = [f"{percent(f['accuracy'])} ({100 * f['accuracy_masks']:.1f})" for f in found]
        rows.append([f"hidden words of {title}, packed (those shown as masks)", *shares])
    for tokens in packed["trees"].get("milliseconds", {}):
        found = [f"{packed[name]['milliseconds'][tokens]:.2f} ms" for name in VARIANTS]
        rows.append([f"CPU time of {tokens} tokens, packed, one thread", *found])
    for task in tasks(folder):
        tuned = read(folder, task)
        cells = [tuned.get(name, {}) for name in VARIANTS]
        title, metric = TASKS[task]
        rows.append([f"{title}, {metric}, of each seed, before packing", *map(seeds, cells)])
        shares = [percent(packed[name].get(task)) for name in VARIANTS]
        rows.append([f"{title}, accuracy of the best seed, packed", *shares])
        rates = [f"{cell['rate']:g}" if "rate" in cell else "" for cell in cells]
        rows.append([f"{title}, rate", *rates])
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
    print("# The encoder of the box beside its dense twin of equal bytes\n")
    print("Recipes `best_encoder_8_minutes` and `bert_8_minutes` (studies/recipes/encoder.py).\n")
    print(table(folder))
    for task in tasks(folder):
        row = read(folder, task)["trees"]
        print(f"\n{TASKS[task][0]}: {row['rows']:,} rows, {row['epochs']} epoch(s), batches of 32,")
        print(f"{'bfloat16' if row['bfloat16'] else 'float32'}. Rates, on held-out training rows")
        print("after one epoch of a part, float32, one seed (studies/recipes/encoder_tasks.py):\n")
        print(search_table(folder, task))


if __name__ == "__main__":
    main(sys.argv[1:])
