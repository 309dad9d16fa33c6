"""Loss, perplexity and bits per byte of a text under a model.

A packed model runs in the engine; a published directory, a training checkpoint or a training run
needs torch (pip install "nomatmul[train]"). The text may be plain or compressed (gzip, bzip2, xz,
zstd) and is one continuous stream: an MLGRU model reads all of it with its state carried on,
an attention model in windows that overlap by half.

What is counted, equally for every backend: where the model has a bos token it goes in front and
every token of the text is scored; where it has none, the first token is context and is not scored.
loss is the mean of -ln p a scored token, perplexity is exp(loss), bits_per_byte is the sum of
-log2 p over the UTF-8 bytes of the scored text, so it compares models with different tokenizers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul._extras import install_line
from nomatmul.cli.options import json_option, kv_option, option
from nomatmul.cli.show import hide_progress_bars, print_json, print_table

if TYPE_CHECKING:
    from nomatmul.evaluate import Scorer

EXAMPLES = """
examples:
  nomatmul eval --text novel.txt                              the model in the box
  nomatmul eval --model packed/mine --text wiki.valid.txt.bz2 --json
  nomatmul eval --model runs/mine --text wiki.valid.txt.bz2 --max-tokens 20000
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None,
        metavar="MODEL",
        help="packed, published or training directory, or hf:owner/name (default: the box)",
    )
    text: str = option(metavar="FILE", help="UTF-8 text, plain or compressed")
    max_tokens: int | None = option(None, metavar="N", help="score the first N tokens only")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.evaluate import score_text
    from nomatmul.evaluate.score import CHARACTERS_PER_TOKEN
    from nomatmul.formats.files.texts import read_text

    limit = options.max_tokens
    if limit is not None and limit < 1:
        raise ValueError(f"--max-tokens is {limit}, it must be at least 1")
    # A character is at most four bytes of UTF-8.
    text = read_text(
        options.text, None if limit is None else (limit + 1) * CHARACTERS_PER_TOKEN * 4
    )
    scorer, backend = _open(options)
    score = score_text(scorer, text, max_tokens=limit)
    if options.json:
        print_json({**dataclasses.asdict(score), "backend": backend})
        return 0
    print_table(
        [
            ("loss", f"{score.loss:.4f}"),
            ("perplexity", f"{score.perplexity:.3f}"),
            ("bits per byte", f"{score.bits_per_byte:.4f}"),
            ("tokens", f"{score.tokens}"),
            ("bytes", f"{score.bytes}"),
            ("tokens/s", f"{score.tokens_per_second:.0f}"),
            ("backend", backend),
        ]
    )
    return 0


def _open(options: Options) -> tuple[Scorer, str]:
    """The model as a scorer, and the name of what runs it."""
    import nomatmul

    model = options.model
    if model is not None:
        from nomatmul.convert.source import find_checkpoint
        from nomatmul.formats.checkpoint import open_checkpoint

        directory = find_checkpoint(Path(model))
        if open_checkpoint(directory).kind != "packed":
            for name, given, default in (
                ("device", options.device, "cpu"),
                ("kv", options.kv, "f16"),
            ):
                if given != default:
                    raise ValueError(
                        f"--{name} {given} is for packed models; {directory} is not packed"
                    )
            return _open_torch(directory, options.threads)
        model = str(directory)
    lm = nomatmul.load(model, threads=options.threads, device=options.device, kv=options.kv)
    return lm, f"engine {lm.backend.isa}"


def _open_torch(directory: Path, threads: int | None) -> tuple[Scorer, str]:
    hide_progress_bars()
    try:
        import torch

        from nomatmul.evaluate.torch_scorer import TorchScorer
    except ImportError as error:
        raise ValueError(
            f"{directory} is not packed, and evaluating it needs torch ({error}): "
            f"{install_line()}, or pack it first"
        ) from None
    if threads is not None:
        torch.set_num_threads(threads)
    scorer = TorchScorer.from_directory(directory)
    return scorer, scorer.backend
