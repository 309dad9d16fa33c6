"""Train a student that learns from another model's predictions, beside the text itself.

TEACHER is any causal language model that transformers loads, or one trained here: a directory,
that of a training run, or hf:owner/name. RECIPE is one of `nomatmul train`, causal. The student
reads text with the teacher's tokenizer, and its vocabulary has as many entries (100,000 of them
make a small student large: each has a row of the embedding and one of the head). At each position
its targets are the text's next token (weight 1 - share) and the teacher's whole distribution
(weight share); what is reported as loss, and held out, is the text's alone, so that runs compare;
distill_loss beside it is how far student and teacher are apart (KL, nats a token).

What it costs: the teacher reads every batch, too. Its forward pass is about a third of the work
that training a model of its size would be, so a teacher as large as the student makes a step a
third longer or more, one three times as large doubles it; its weights and one layer's
activations stay in memory (the estimate counts them). Sequences are as long as both read.

When it pays: where text is short, or the teacher has read much more than you have. Where text is
plentiful it does not pay in time: on our small models a teacher gave 1.8 to 2.1 % fewer bits at
equal tokens for 1.8 to 2 times the seconds, and twice the tokens without one gave more.

--cache DIR keeps what the teacher says: the --top likeliest tokens at each position and the mass
of the rest, 2 + 4 bytes times --top a token of the text (64: 258 bytes; 2 + 6 times above 65,536
entries). It is written first, by one process, and read in every epoch, in later runs too, if data,
tokenizer, teacher, seed, sequence length, top and temperature are the same; the teacher is then not
in memory while the student is trained. Free space is checked before the teacher is loaded.

The same command continues a run that was stopped, with the same losses, if TEACHER, share and
temperature are the same. With torchrun every process has the whole teacher; the student is sharded
as `nomatmul train` does it. All other options are those of `nomatmul train`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nomatmul.cli import train
from nomatmul.cli.options import option

EXAMPLES = """
examples:
  nomatmul distill runs/teacher cpu_minute --data novel.txt --out runs/student
  nomatmul distill hf:HuggingFaceTB/SmolLM2-135M box --data corpus/*.txt.zst --out runs/taught \\
    --share 0.7 --temperature 2 --set sequence_length=1024
  nomatmul distill hf:Qwen/Qwen3-0.6B-Base box --data corpus/*.txt.zst --out runs/taught \\
    --cache caches/qwen3 --top 32 --set sequence_length=1024
  torchrun --nproc-per-node 4 -m nomatmul distill models/qwen3 mmfree_370m --data hf:owner/name \\
    --out runs/370m
a teacher of your own, trained before:
  nomatmul train transformer_cpu_minute --data novel.txt --out runs/teacher
"""


@dataclass(frozen=True, kw_only=True)
class _Teaching:
    teacher: str = option(
        positional=True, metavar="TEACHER", help="a model's directory, or hf:owner/name"
    )
    share: float = option(
        0.5, metavar="W", help="the teacher's weight among the targets, above 0 and at most 1"
    )
    temperature: float = option(
        1.0, metavar="T", help="divides both models' logits before they are compared"
    )
    cache: str | None = option(
        None,
        metavar="DIR",
        help="keep what the teacher says on disk, or read it there: --top tokens and the rest's"
        " mass, 4 bytes a kept token and 2 more (6 above 65,536 entries)",
    )
    top: int | None = option(
        None, metavar="K", help="likeliest tokens of the teacher that --cache keeps (default: 64)"
    )


@dataclass(frozen=True, kw_only=True)
class Options(train.Options, _Teaching):
    tokenizer: str | None = option(
        None, metavar="FILE", help="checked to be the teacher's (default: the teacher's)"
    )


def run(options: Options) -> int:
    from nomatmul.train import main
    from nomatmul.train.distill import DistillArgs

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return main(DistillArgs(**values))
