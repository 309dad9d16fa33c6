"""Make a pretrained decoder ternary: its own weights as the start, itself as the teacher.

MODEL is Llama- or Qwen3-shaped, as transformers stores it: a directory with config.json,
safetensors and tokenizer.json, hf:owner/name, or the run of a transformer_... recipe. The linear
layers of its blocks become ternary; norms, rotary positions, grouped heads and sizes stay, and so
do the embedding and the head, as floats. What has no place here (biases, experts, sliding windows,
other activations) is refused by name.

It is trained on --data so that it predicts what MODEL itself predicts: MODEL runs beside it in full
precision, as teacher. --set teacher_share=0.5 lets the text's own next tokens count as much.
--scale-group says how many inputs of a row share a scale: with 32, 64, 128 or 256 only weights are
rounded; 0 is one scale a matrix and int8 activations, as BitNet has them.

How long: a model that was pretrained well takes billions of tokens (docs/ternarising.md says what
1B and 8B cost, and what others used); a small one of your own, about a third of its own training.
Text should be like what the model is for. The same command continues a run that was stopped, with
the same losses; Ctrl-C and SIGTERM save first. Needs pip install "nomatmul[train]".

OUT is a run as `nomatmul train` makes them (metrics.jsonl, TensorBoard, checkpoints); OUT/model
holds ternary values and float16 scales, which `nomatmul pack`, `nomatmul export` and
`CausalLM.from_pretrained` take as they are.

Many GPUs: torchrun --nproc-per-node N -m nomatmul ternarise ... shards student and optimiser over
them; each holds the teacher.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nomatmul.cli.options import option
from nomatmul.cli.training_options import TrainingOptions

EXAMPLES = """
examples:
  nomatmul ternarise hf:Qwen/Qwen3-0.6B-Base --data hf:roneneldan/TinyStories --out runs/q \\
      --total-tokens 300_000_000 --sequence-length 1024
  nomatmul ternarise models/my-llama --data corpus/*.txt.zst --valid valid.txt --out runs/llama
  nomatmul ternarise runs/twin --data novel.txt --out runs/twin-ternary --steps 500 --batch-size 16
  torchrun --nproc-per-node 8 -m nomatmul ternarise models/llama-8b --data corpus/* --out runs/8b \\
      --total-tokens 10_000_000_000 --set micro_batch_size=1 --set recompute=block
  nomatmul pack runs/llama packed/llama        and then: nomatmul chat --model packed/llama
"""


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: str = option(positional=True, metavar="MODEL", help="directory, run or hf:owner/name")
    data: tuple[str, ...] = option(
        metavar="FILE", nargs="+", help="texts to train on, as of `nomatmul train`"
    )
    out: str = option(metavar="DIR", help="directory of the run; an old run there is continued")
    scale_group: int = option(
        128, metavar="N", help="inputs of a row that share a scale: 32, 64, 128, 256, or 0 for all"
    )
    valid: tuple[str, ...] = option(
        (), metavar="FILE", nargs="+", help="held-out texts (default: the end of the data)"
    )
    steps: int | None = option(None, metavar="N", help="optimiser steps (default: 2000)")
    total_tokens: int | None = option(
        None, metavar="N", help="tokens to train on, in place of --steps"
    )
    sequence_length: int | None = option(
        None, metavar="N", help="tokens of a sequence (default: 2048, or the most the model reads)"
    )
    batch_size: int | None = option(None, metavar="N", help="sequences a step (default: 64)")
    set: tuple[str, ...] = option(
        (), metavar="NAME=VALUE", help="override a setting of training; may be repeated"
    )


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, _Source):
    pass


def run(options: Options) -> int:
    from nomatmul.train import main
    from nomatmul.train.ternarise import TernariseArgs

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return main(TernariseArgs(recipe=values.pop("model"), **values))
