"""Write a ternary model in the form that another engine reads.

MODEL is what `pack` takes (a checkpoint, the directory of a run of `train` or `ternarise`, a
published model, a GGUF file, hf:owner/name) or a packed directory. It must be a decoder with
attention, of Llama's or Qwen3's shape; layers that these families have not (MLGRU, trees, norms
inside linears) are refused by name. Nothing is trained and nothing is quantised anew.

--to gguf makes one file for llama.cpp and its kin. TQ2_0 has a scale for 256 inputs: exact where
the model has one a tensor or a group of 256. PQ2_0 (groups of 128) is read by PrismML's fork only;
--type q2_0 says the same in groups of 64 (2.25 bits instead of 2.13) and llama.cpp reads it.
--to unpacked makes a directory that transformers loads as LlamaForCausalLM or Qwen3ForCausalLM:
every weight is -s, 0 or s in float16, at 16 bits a weight. `nomatmul pack` of it gives the same
ternary values and scales again. --to packed is `nomatmul pack`.

What is rounded is said: scales become float16 numbers once (both forms then hold the same model),
and in a GGUF file an embedding of 32 bits becomes float16 (--embedding f32 keeps it). llama.cpp
rounds the inputs of a ternary product to int8 for each 256 (TQ2_0) or 32 (Q2_0) of them,
transformers not at all: a model that was trained with int8 activations a token gets a warning.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomatmul._hub_names import PREFIX
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import hide_progress_bars, print_json, print_table, size
from nomatmul.cli.signals import clean_up_when_terminated

if TYPE_CHECKING:
    from nomatmul.convert.export import ExportResult

EXAMPLES = """
examples:
  nomatmul export runs/ternary ternary.gguf
  nomatmul export runs/ternary ternary-unpacked
  nomatmul export packed/mine mine.gguf --type q2_0 --embedding q8_0
  nomatmul export hf:owner/name@main bonsai.gguf --type q2_0
  llama-cli -m ternary.gguf -p "The river"
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option(
        positional=True, metavar="MODEL", help="the model to export, a path or hf:owner/name"
    )
    out: str = option(positional=True, metavar="OUT", help="the file or directory to make")
    to: str = option(
        "auto",
        choices=("auto", "gguf", "unpacked", "packed"),
        help="the form; auto: gguf where OUT ends in .gguf, else unpacked",
    )
    type: str = option(
        "auto",
        choices=("auto", "tq2_0", "pq2_0", "q2_0"),
        help="GGUF: blocks of ternary matrices; auto: tq2_0 for a scale a tensor or 256 inputs,"
        " pq2_0 for 128, q2_0 for 64",
    )
    embedding: str = option(
        "auto",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
        help="embedding and head where they are not ternary; auto: exact, but 16 bits at most in a"
        " GGUF file; q8_0: GGUF only",
    )
    json: bool = json_option()


def run(options: Options) -> int:
    if not options.model.startswith(PREFIX):  # bars of a download are wanted
        hide_progress_bars()
    from nomatmul.convert.export import export
    from nomatmul.convert.progress import line

    clean_up_when_terminated()
    quiet = options.json or not sys.stderr.isatty()
    result = export(
        options.model,
        options.out,
        to=options.to,
        type=options.type,
        embedding=options.embedding,
        progress=None if quiet else line("exporting"),
    )
    if options.json:
        print_json(dataclasses.asdict(result))
    else:
        _show(result)
    return 0


def _show(result: ExportResult) -> None:
    print(f"exported {result.parameters:,} parameters to {result.destination}")
    rows = [("form", " ".join(filter(None, (result.to, result.family, result.type))))]
    rows += [
        ("source", size(result.source_bytes)),
        ("exported", size(result.exported_bytes)),
        ("seconds", f"{result.seconds:.1f}"),
        ("tokenizer", result.tokenizer),
    ]
    print_table(rows)
    for note in result.notes:
        print(f"note: {note}")
