"""Does a conditional layer pay? Train one model with several channel mixers and compare them.

RECIPE is a model of `nomatmul train` (causal or encoder, dense or ternary). Every variant sees the
same tokens in the same order with the same learning rate; only its channel mixer differs. The
controls that are run unless you name others with --variant:

  dense              the whole layer of the recipe
  none               no channel mixer at all: what is it worth?
  fff-16x6           16 trees of depth 6: a token makes 6 decisions and computes 7 neurons of the
                     127 of each tree; three shapes of equal parameters, from one deep tree to
                     many shallow ones
  dense-112          a small dense layer of as many neurons as the trees above make active: if it is
                     as good, the trees bought nothing
  fff-...-balanced   trees trained with a load-balancing loss

and further -masterN (a dense layer of N neurons beside the trees), -everyN (trees in one layer of
N). Trees are named trees x depth, as in the papers.

OUT gets report.md (a table), summary.json, a plot and rows.jsonl, a row a run: the same command
goes on after the last finished run. Scores are held-out bits per byte (encoders: nats a guessed
token). Needs pip install "nomatmul[train]".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nomatmul._extras import require_train
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table
from nomatmul.cli.training_options import TextOptions

EXAMPLES = """
examples:
  nomatmul compare cpu_minute --data novel.txt --valid other.txt --out runs/cmp --budget 300k
  nomatmul compare encoder_cpu_minute --data novel.txt --valid other.txt --out runs/mlm \\
      --budget 2M --seeds 3
  nomatmul compare box --data wiki-*.txt.bz2 --valid wiki.valid.txt.bz2 --out runs/trees \\
      --budget 30M --variant dense --variant fff-64x4 --variant dense-320 --devices cuda:0,cuda:1
"""


def tokens(text: str) -> int:
    """A number of tokens: 300k, 26M, 1.5e6."""
    import argparse

    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens: 300k, 26M") from None
    if not 1 <= value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 1 on")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class _Variants:
    recipe: str = option(positional=True, metavar="RECIPE", help="name of a recipe")
    data: tuple[str, ...] = option(metavar="FILE", nargs="+", help="texts to train on")
    valid: tuple[str, ...] = option(metavar="FILE", nargs="+", help="held-out texts")
    out: str = option(metavar="DIR", help="directory of the report; rows that lie there stay")
    budget: int = option(metavar="TOKENS", type=tokens, help="tokens of each run: 300k, 26M")
    variant: tuple[str, ...] = option(
        (), metavar="NAME", help="a channel mixer, may be repeated (default: the controls above)"
    )
    seeds: int = option(2, metavar="N", help="runs of each variant; one alone proves little")
    set: tuple[str, ...] = option(
        (), metavar="NAME=VALUE", help="override a setting of the recipe; may be repeated"
    )
    tokenizer: str | None = option(
        None, metavar="FILE", help="a tokenizer.json (default: one is trained on the data)"
    )


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions, _Variants):
    eval_tokens: int = option(500_000, metavar="N", help="held-out tokens to score, at most")
    points: int = option(8, metavar="N", help="looks at the held-out text during a run")
    devices: str = option("auto", metavar="LIST", help="cpu, or cuda:0,cuda:1; auto: all GPUs")
    lanes: int = option(1, metavar="N", help="runs at a time on each GPU; two fill small models")
    threads: int | None = option(
        None, metavar="N", help="threads of a run on the CPU (default: one a core)"
    )
    time_limit: float | None = option(
        None, metavar="SECONDS", help="stop then; the same command goes on (default: no limit)"
    )
    implementation: str | None = option(
        None,
        choices=("naive", "masked", "triton", "native"),
        help="how trees are computed (default: what serves the device best)",
    )
    keep: bool = option(False, help="keep the trained models in DIR/models")
    report_only: bool = option(False, help="write the report from rows that lie there, no training")
    force: bool = option(False, help="train although memory seems too small")
    quiet: bool = option(False, help="no progress on stderr")
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.evaluate.compare_report import write_report

    out = Path(options.out)
    if options.report_only:
        if not (out / "rows.jsonl").is_file():
            raise ValueError(f"{out} has no rows.jsonl to report on")
        result = {"out": str(out), "report": str(out / "report.md"), **write_report(out)}
    else:
        from nomatmul.train.signals import Stopped

        try:
            result = _train(options, out)
        except Stopped:
            print("nomatmul: interrupted; the same command makes the missing runs", file=sys.stderr)
            return 130
    if options.json:
        print_json(result)
        return 0
    for name, entries in result["sections"].items():
        print(name)
        print_table(
            [
                [e["label"], str(e["neurons"]), str(e["active"]), str(len(e["values"])),
                 f"{e['score']:.4f}", "-" if e["error"] is None else f"{e['error']:.4f}"]
                for e in entries
            ],
            ["channel mixer", "neurons", "active", "seeds", "score", "error"],
        )  # fmt: skip
    for text in result.get("failed", []):
        print(f"nomatmul: warning: {text}", file=sys.stderr)
    if result.get("missing"):
        print(f"{result['missing']} runs are missing; the same command makes them", file=sys.stderr)
    print(f"the report is {result['report']}")
    return 0


def _train(options: Options, out: Path) -> dict:
    require_train("compare, which trains models,")  # its absence is one line
    from nomatmul.evaluate.compare import CompareOptions, compare
    from nomatmul.formats.cpus import usable_cpus
    from nomatmul.train.overrides import apply_overrides
    from nomatmul.train.recipes import recipe
    from nomatmul.train.signals import StopSignals

    same = {f.name for f in fields(CompareOptions)} & {f.name for f in fields(Options)}
    given: Any = {name: getattr(options, name) for name in same - {"out", "threads"}}
    request = CompareOptions(
        config=apply_overrides(recipe(options.recipe), options.set),
        out=out,
        variants=options.variant,
        threads=options.threads or usable_cpus(),
        **given,
    )

    def log(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    with StopSignals():
        return compare(request, log, quiet=options.quiet)
