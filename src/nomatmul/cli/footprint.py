"""Bytes of a packed model: on disk, resident and peak while it runs, and where they go.

"resident" and "peak" are what the weights, one sequence's state and the work space take after
loading and at the worst moment; "dense bf16" is what the same parameters would take unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table, size

EXAMPLES = """
examples:
  nomatmul footprint                                the model in the box
  nomatmul footprint --model my-model-packed
  nomatmul footprint --model my-model-packed --json | jq .resident
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(None, metavar="DIR", help="packed model (default: the one in the box)")
    json: bool = json_option()


def run(options: Options) -> int:
    import nomatmul

    report: dict[str, Any] = dict(nomatmul.footprint(options.model))
    if options.json:
        print_json(report)
        return 0
    rows = []
    for name, value in report.items():
        if isinstance(value, dict):
            rows += [(f"  {name}: {part}", size(count)) for part, count in value.items()]
        elif isinstance(value, int | float):
            rows.append((name.replace("_", " "), size(value)))
    print_table(rows)
    return 0
