"""Classify texts, or every token of them, with a packed encoder that was fine-tuned for it.

`nomatmul finetune` trains such a model, of the encoder in the box where no other is named, and
`nomatmul pack` packs it, labels included. A classifier of sequences answers with a label and its
probability for each text (a regression with a number), a classifier of tokens with a label for each
token. For models of text pairs (paraphrases, entailment) --pairs takes each text as two, with a tab
between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nomatmul.cli.encoding import as_pairs, load_encoder, read_texts
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table

EXAMPLES = """
examples:
  nomatmul classify --model sst2-packed "a fine film" "two hours of nothing"
  nomatmul classify --model sst2-packed --file reviews.txt --json | jq -r '.answers[].label'
  cut -f1,2 pairs.tsv | nomatmul classify --model mrpc-packed --file - --pairs
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option(
        metavar="MODEL", help="packed classifier (nomatmul pack makes one), or hf:owner/name"
    )
    words: tuple[str, ...] = option((), positional=True, metavar="TEXT", help="a text, or several")
    text: tuple[str, ...] = option((), metavar="TEXT", help="the same as TEXT alone")
    file: str | None = option(
        None, metavar="FILE", help="texts, one a line; - reads standard input"
    )
    pairs: bool = option(False, help="each text is two, with a tab between")
    truncate: bool = option(False, help="cut texts that are too long instead of refusing them")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    json: bool = json_option()


def run(options: Options) -> int:
    texts = read_texts(options.words + options.text, options.file)
    batch: list[Any] = as_pairs(texts) if options.pairs else list(texts)
    model = load_encoder(options)
    answers = model.classify(batch, truncate=options.truncate)
    if options.json:
        print_json(
            {
                "model": str(model.path),
                "task": model.task,
                "labels": list(model.labels),
                "answers": [{"input": t, **a} for t, a in zip(texts, answers, strict=True)],
            }
        )
        return 0
    for text, answer in zip(texts, answers, strict=True):
        if "tokens" in answer:
            rows = [(t["text"], f"{t['score']:.3f}", t["label"]) for t in answer["tokens"]]
            print_table(rows)
            print()
        elif "value" in answer:
            print(f"{answer['value']:.4f}\t{text}")
        else:
            print(f"{answer['label']}\t{answer['score']:.4f}\t{text}")
    return 0
