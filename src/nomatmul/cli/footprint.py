"""Bytes of a packed model: on disk, resident and peak while it runs, and where they go.

The model is loaded and decodes a few tokens; "resident" and "peak" are of that whole process,
Python included, then and at its worst moment. "dense bf16" is what the same parameters would take
unpacked. Keys and values, of a model with attention, come on top for each token of each sequence.
With a GPU the weights and the work space lie in its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.cli.options import json_option, kv_option, option
from nomatmul.cli.show import print_json, print_table, size

EXAMPLES = """
examples:
  nomatmul footprint                                the model in the box
  nomatmul footprint --model my-model-packed
  nomatmul footprint --model my-model-packed --json | jq .resident
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None, metavar="MODEL", help="packed model, or hf:owner/name (default: the one in the box)"
    )
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    json: bool = json_option()


# Keys of the report in the order and the words of the text form.
ROWS = (
    ("disk", "on disk"),
    ("resident", "resident, this process"),
    ("peak", "peak, this process"),
    ("weights", "weights in memory"),
    ("embedding", "  embedding"),
    ("core", "  core (ternary)"),
    ("trees", "  trees (rows of FFF)"),
    ("dense", "  dense matrices"),
    ("head", "  head"),
    ("norms", "  norms, scales, bounds"),
    ("state", "state of a sequence"),
    ("kv_token", "  keys and values of a token"),
    ("kv_longest", "  of the longest sequence"),
    ("scratch", "work space"),
    ("device_peak", "peak, device"),
    ("dense_bf16", "dense bf16 would take"),
)


def run(options: Options) -> int:
    import nomatmul

    report = nomatmul.footprint(options.model, device=options.device, kv=options.kv)
    if options.json:
        print_json(report)
    else:
        print_table([(words, size(report[key])) for key, words in ROWS if key in report])
    return 0
