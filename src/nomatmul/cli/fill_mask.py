"""Let a packed masked language model fill the gaps of a text.

Write the model's mask token where a word is missing: [MASK] for models with BERT's tokenizer, as
the encoder in the box has, which answers without --model. For each gap the most likely tokens are
listed with their probability and the text that results; gaps are filled one at a time, the other
gaps of the text stay open.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nomatmul.cli.encoding import load_encoder
from nomatmul.cli.options import json_option, option
from nomatmul.cli.sampling import checked_text
from nomatmul.cli.show import print_json, print_table

EXAMPLES = """
examples:
  nomatmul fill-mask "She opened the [MASK] and went into the house."    the encoder in the box
  nomatmul fill-mask --model my-encoder --text "A [MASK] in the [MASK]." --top-k 3 --json
  echo "The [MASK] flows to the sea." | nomatmul fill-mask --model my-encoder --text -
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None,
        metavar="MODEL",
        help="packed masked language model, or hf:owner/name (default: the encoder in the box)",
    )
    words: str | None = option(
        None,
        positional=True,
        metavar="TEXT",
        help="a text with mask tokens; - reads standard input",
    )
    text: str | None = option(None, metavar="TEXT", help="the same as TEXT alone")
    top_k: int = option(5, metavar="K", help="fillings listed for each gap")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    json: bool = json_option()


def run(options: Options) -> int:
    if options.words is not None and options.text is not None:
        raise ValueError("the text is given twice; give TEXT or --text TEXT")
    text = options.words if options.text is None else options.text
    if text is None:
        raise ValueError('there is no text; try nomatmul fill-mask "the [MASK] of France"')
    if text == "-":
        text = sys.stdin.read().removesuffix("\n")
    model = load_encoder(options)
    masks = model.fill_mask(checked_text(text), options.top_k)
    if options.json:
        print_json({"model": str(model.path), "text": text, "masks": masks})
        return 0
    for number, fillings in enumerate(masks, 1):
        if len(masks) > 1:
            print(f"gap {number}")
        print_table([(f["token"], f"{f['score']:.4f}", f["text"]) for f in fillings])
    return 0
