"""A few invented rows for each of the local tasks of lm-evaluation-harness (tasks/).

A library: of the dry run of zero_shot.py, and of tests.
"""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"

CHOICES: list[dict[str, Any]] = [
    {"query": "Question: What falls from clouds?", "choices": ["rain", "stone walls"], "gold": 0},
    {"query": "Question: What do cows eat?", "choices": ["iron", "grass in fields", "sand"],
     "gold": 1},
    {"query": "Question: Which one is hot?", "choices": ["ice", "fire", "snow", "milk"], "gold": 1},
]  # fmt: skip
LAST_WORDS = [
    {
        "context": "The king was old. The queen was young. They called for the",
        "continuation": "king",
    },
    {"context": "He opened the door and went through the", "continuation": "door"},
]
WINOGRANDE = [
    {
        "context_options": [
            "The ball broke the glass as the ball",
            "The ball broke it as the glass",
        ],
        "continuation": "was made of steel.",
        "gold": 0,
    },
    {
        "context_options": ["Tom thanked Ann because Tom", "Tom thanked Ann because Ann"],
        "continuation": "had helped him.",
        "gold": 1,
    },
]
PIQA = [
    {"goal": "Boil an egg.", "sol1": "Put it in hot water.", "sol2": "Put it on a shelf."},
    {"goal": "Dry a shirt.", "sol1": "Leave it in the rain.", "sol2": "Hang it in the sun."},
]
HELLASWAG = """\
Cooking: [header] How to cook rice [title] Take a pot. He pours
1
the sky into the pot.
water into the pot.
a car over it.
nothing, then sleeps.
Running: A woman ties her shoes. she
3
eats them.
is a lamp.
[step] flies away.
starts to run.
"""


def write_local_data(directory: Path) -> Path:
    """Write the files that the tasks read; returns the directory."""
    files = {
        "arc_easy.jsonl": CHOICES,
        "arc_challenge.jsonl": CHOICES[1:],
        "openbook_qa.jsonl": CHOICES,
        "lambada_openai.jsonl": LAST_WORDS,
        "winogrande.jsonl": WINOGRANDE,
        "piqa_valid.jsonl": PIQA,
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "piqa_valid-labels.lst").write_text("0\n1\n")
    packed = bz2.compress(HELLASWAG.encode())
    (directory / "hellaswag_val_full.txt.bz2").write_bytes(packed)
    return directory
