"""The table of the box's encoder beside its dense twin, from the scores that encoder.py left.

    python studies/recipes/encoder_page.py benchmarks/results/2026-12-01-recipes-encoder

It becomes FOLDER/tables.md. FOLDER has encoder-packed.json (hidden words, tasks, speed of the
packed models) and encoder-TASK.json (fine-tuning). `table` fills the card, too
(studies/box/ship.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.dry_run import add_tiny, temporary
from nomatmul.formats.files.atomic import write_file

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


def page(folder: Path) -> str:
    parts = ["# The encoder of the box beside its dense twin of equal bytes"]
    parts += ["Recipes `best_encoder_8_minutes` and `bert_8_minutes` (studies/recipes/encoder.py)."]
    parts += [table(folder)]
    for task in tasks(folder):
        row = read(folder, task)["trees"]
        parts += [
            f"{TASKS[task][0]}: {row['rows']:,} rows, {row['epochs']} epoch(s), batches of 32,"
            f" {'bfloat16' if row['bfloat16'] else 'float32'}. Rates, on held-out training rows"
            " after one epoch of a part, float32, one seed (studies/recipes/encoder_tasks.py):"
        ]
        parts += [search_table(folder, task)]
    return "\n\n".join(parts) + "\n"


def invented(folder: Path) -> Path:
    """Scores of a dry run."""
    share = {"accuracy": 0.5, "accuracy_masks": 0.4}
    row = {"packed": dict.fromkeys(TEXTS, share), "milliseconds": {"5": 1.0}, "sst2": 0.5}
    tuned = {"rate": 1e-3, "median": 0.5, "scores": [share], "rows": 1, "epochs": 1}
    search = [{**tuned, "variant": name} for name in VARIANTS]
    cells = {name: {**tuned, "bfloat16": False} for name in VARIANTS}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("packed", dict.fromkeys(VARIANTS, row)), ("sst2", cells)):
        text = json.dumps({**values, "search": search})
        write_file(folder / f"encoder-{name}.json", text.encode())
    return folder


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of the scores")
    parser.add_argument("--out", type=Path, help="folder of a dry run")
    add_tiny(parser)
    args = parser.parse_args(words)
    if args.tiny:
        args.folder = invented(args.out or temporary())
    if args.folder is None:
        parser.error("the folder of the scores is missing")
    write_file(args.folder / "tables.md", page(args.folder).encode())
    print(args.folder / "tables.md")


if __name__ == "__main__":
    main()
