"""Bytes that the accelerator's channel mixer fetches a token: ternary trees beside a GLU.

    python benchmarks/hardware_trees.py                      # four shapes of trees, d = 512
    python benchmarks/hardware_trees.py --trees 16x7 --size 1024

A model of one layer with random ternary weights runs in Verilator three times: with the trees, with
a GLU of as many neurons as the trees have nodes, and without a channel mixer. Words are counted at
the memory port, for a token without logits; what the third model fetches is taken off both, so norm
weights and parameters of the mixer count, the token mixer does not. The same for cycles (a memory
word each cycle, 40 cycles for the first). Needs the extra `hardware` and a C++ compiler. Writes
DATE-hardware-trees.json and .md to --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary
from hardware_blocks import computed, one_layer, simulated

from nomatmul.hardware.design import Design

SHAPES = ["64x5", "16x7", "32x7", "16x9"]  # trees x levels, as studies of quality have them
GOAL = 5.0


def neurons(shape: str) -> tuple[int, int, int]:
    """(trees, depth, nodes of all trees) of "TREESxLEVELS"; ValueError for another text."""
    trees, _, levels = shape.partition("x")
    if not (trees.isdigit() and levels.isdigit() and int(trees) and int(levels)):
        raise ValueError(f"{shape!r} are no trees; write TREESxLEVELS, such as 16x7")
    return int(trees), int(levels) - 1, int(trees) * ((1 << int(levels)) - 1)


def mixer(dials: dict[str, Any], design: Design, simulate: bool) -> dict[str, int]:
    """Bytes and cycles of a token without logits."""
    with tempfile.TemporaryDirectory(prefix="nomatmul-trees.") as folder:
        reader = one_layer(dials, Path(folder) / "model")
        found = (simulated if simulate else computed)(reader, design, None)["block"]
    return {"bytes": int(found["words"] * design.memory_bytes), "cycles": int(found["cycles"])}


def row_of(shape: str, size: int, design: Design, simulate: bool) -> dict[str, Any]:
    """Trees and GLU, each beside the model without a channel mixer."""
    trees, depth, nodes = neurons(shape)
    common = {"vocab_size": 64, "hidden_size": size, "num_layers": 1, "num_heads": 1}
    kinds: dict[str, dict[str, Any]] = {
        "none": {"channel_mixer": "none"},
        "glu": {"intermediate_size": nodes},
        "trees": {
            "channel_mixer": "fff", "activation": "silu", "fff_trees": trees, "fff_depth": depth,
        },
    }  # fmt: skip
    seen = {kind: mixer(common | dials, design, simulate) for kind, dials in kinds.items()}
    row: dict[str, Any] = {"shape": shape, "size": size, "nodes": nodes}
    row |= {"visits": trees * (depth + 1), "kind": "simulated" if simulate else "computed"}
    for kind in ("glu", "trees"):
        for what in ("bytes", "cycles"):
            row[f"{kind}_{what}"] = seen[kind][what] - seen["none"][what]
    return row


def page(document: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about, design = document["machine"], document["design"]
    text = [
        f"# Bytes of a channel mixer on the accelerator, {about['date']}",
        "",
        f"`benchmarks/hardware_trees.py`, commit {about['commit']}; {design['lanes']} lanes, memory"
        f" words of {design['memory_bits']} bits, one a cycle. Bytes are counted at the memory port"
        " of the simulated design (`computed`: from the program). Goal: trees fetch at least"
        f" {GOAL:.0f} times fewer than a GLU of equally many neurons.",
        "",
        "| d | trees x levels | neurons | visited | GLU, bytes a token | trees, bytes a token"
        " | times fewer | GLU, cycles | trees, cycles | kind |",
        "|" + "---|" * 10,
    ]
    for row in document["rows"]:
        fewer = row["glu_bytes"] / row["trees_bytes"]
        text.append(
            f"| {row['size']} | {row['shape']} | {row['nodes']:,} | {row['visits']}"
            f" | {row['glu_bytes']:,} | {row['trees_bytes']:,} | {fewer:.1f}"
            f" | {row['glu_cycles']:,} | {row['trees_cycles']:,} | {row['kind']} |"
        )
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trees", nargs="+", default=SHAPES, metavar="TREESxLEVELS")
    parser.add_argument("--size", type=int, default=512, help="hidden size (default 512)")
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument(
        "--computed", action="store_true", help="count in the program, not in Verilator"
    )
    add_tiny(parser)
    options = parser.parse_args(arguments)
    simulate = not (options.tiny or options.computed)
    if options.tiny:
        shrink(options, parser, trees=["2x4"], size=40, lanes=32, out=temporary())
    try:
        for shape in options.trees:
            neurons(shape)
    except ValueError as error:
        parser.error(str(error))
    options.out = options.out or Path(__file__).parent / "results"
    options.out.mkdir(parents=True, exist_ok=True)
    design = Design(
        lanes=options.lanes, memory_bits=64 if options.tiny else 512, trees=True, tree_rows=512
    )
    document: dict[str, Any] = {"machine": report.machine(""), "design": vars(design), "rows": []}
    for shape in options.trees:
        print(f"{shape}, d = {options.size}", flush=True)
        document["rows"].append(row_of(shape, options.size, design, simulate))
    path = options.out / f"{document['machine']['date']}-hardware-trees.json"
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(page(document), "utf-8")
    print(page(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
