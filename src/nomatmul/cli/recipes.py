"""List the recipes of `nomatmul train`: models with their sizes, data and schedules.

A recipe is the first word of `nomatmul train` and `nomatmul compare`; --set NAME=VALUE there
changes single settings. tokens: what a run reads in all, its text several times over if that is
shorter. time: about, or the recipe's own limit, which then ends the run whatever it has read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nomatmul.cli.options import json_option
from nomatmul.cli.show import print_json

EXAMPLES = """
examples:
  nomatmul recipes
  nomatmul recipes --json | jq -r '.recipes[] | select(.parameters < 2e6) | .name'
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    json: bool = json_option()


def run(options: Options) -> int:
    recipes = _recipes()
    if options.json:
        print_json({"recipes": recipes})
        return 0
    width = max(len(entry["name"]) for entry in recipes)
    print(f"{'recipe':{width}}  parameters  layers x width  tokens  time            what for")
    for entry in recipes:
        shape = f"{entry['layers']} x {entry['width']}"
        print(
            f"{entry['name']:{width}}  {_short(entry['parameters']):>10}  {shape:>14}  "
            f"{_short(entry['tokens']):>6}  {entry['time'] or '-':14}  {entry['for']}"
        )
    return 0


def _recipes() -> list[dict[str, Any]]:
    from nomatmul.train.recipes import ABOUT, RECIPES

    found = []
    for name, make in RECIPES.items():
        config = make()
        time, purpose = ABOUT[name]
        found.append(
            {
                "name": name,
                "parameters": config.model.param_count(),
                "layers": config.model.num_layers,
                "width": config.model.hidden_size,
                "sequence_length": config.sequence_length,
                "tokens": None if config.time_limit else config.steps * config.tokens_per_step,
                "time": time,
                "for": purpose,
            }
        )
    return found


def _short(count: float | None) -> str:
    """1.3M, 15B, or a dash."""
    if count is None:
        return "-"
    for unit, step in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= step:
            return f"{count / step:.3g}{unit}"
    return f"{count:.0f}"
