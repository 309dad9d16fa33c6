"""Train a MatMul-free language model, its Transformer++ twin, or an encoder, on your own text.

RECIPE names the sizes and the schedule: cpu_minute (a million parameters, a minute on two cores),
box (packs to 12 MB), mmfree_370m, mmfree_1_3b, mmfree_2_7b (the published ones), and the baseline
of each under transformer_...; encoders, which guess hidden words and which `nomatmul finetune` then
teaches a task: encoder_cpu_minute, ultrafastbert_1x11, ultrafastbert_128x4, and their dense twins
bert_cpu_minute and crammedbert. `nomatmul recipes` lists them all. Single settings are changed by
--set NAME=VALUE (fields of the model: --set model.NAME=VALUE).

Texts are UTF-8 files, JSON (a row or an element of an array is a document), parquet, a data set
saved by Hugging Face datasets, or hf:NAME from the hub; plain or compressed (gzip, bzip2, xz,
zstd); pipes, and - for standard input. What a file is, its contents tell. Text that spells a
special token is ordinary text, in training as everywhere. The same command continues a run that was
stopped, with the same losses. Ctrl-C and SIGTERM save first. Needs pip install "nomatmul[train]".

Many GPUs: torchrun --nproc-per-node N -m nomatmul train ... shards model and optimiser over them;
batch_size is that of all together, micro_batch_size that of one. A run can be continued on another
number of GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nomatmul.cli.options import option
from nomatmul.cli.training_options import TrainingOptions

EXAMPLES = """
examples:
  nomatmul train cpu_minute --data novel.txt --out runs/first
  nomatmul train box --data wiki-*.txt.bz2 --valid wiki.valid.txt.bz2 --out runs/box
  nomatmul train mmfree_370m --data hf:roneneldan/TinyStories --out runs/370m --seed 1
  nomatmul train cpu_minute --data novel.txt --out runs/wide --set model.hidden_size=256 --steps 500
  nomatmul train cpu_minute --data talks.jsonl --start runs/first --out runs/talking
  nomatmul train encoder_cpu_minute --data novel.txt --out runs/encoder
  nomatmul train ultrafastbert_1x11 --data corpus/*.txt.bz2 --tokenizer vocab.txt --out runs/ufb
  torchrun --nproc-per-node 4 -m nomatmul train mmfree_1_3b --data corpus/*.txt.zst --out runs/1b
  nomatmul pack runs/first packed/first        and then: nomatmul generate --model packed/first ...
"""


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    recipe: str = option(positional=True, metavar="RECIPE", help="name of a recipe")
    data: tuple[str, ...] = option(
        metavar="FILE", nargs="+", help="texts to train on (- is standard input)"
    )
    out: str = option(metavar="DIR", help="directory of the run; an old run there is continued")
    valid: tuple[str, ...] = option(
        (), metavar="FILE", nargs="+", help="held-out texts (default: the end of the data)"
    )
    tokenizer: str | None = option(
        None,
        metavar="FILE",
        help="a tokenizer.json or BERT's vocab.txt (default: one is trained on the data)",
    )
    start: str | None = option(
        None,
        metavar="DIR",
        help="begin with the weights of this run or model, and read text with its tokenizer",
    )
    set: tuple[str, ...] = option(
        (), metavar="NAME=VALUE", help="override a setting of the recipe; may be repeated"
    )
    steps: int | None = option(None, metavar="N", help="optimiser steps")


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, _Recipe):
    pass


def run(options: Options) -> int:
    from nomatmul.train import TrainArgs, main

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return main(TrainArgs(**values))
