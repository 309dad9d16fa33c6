"""Continue a prompt. The text streams to standard output as it is made; --json gives it at the end.

nomatmul generate "The river" is enough: the prompt may stand alone, or behind --prompt.
--temperature 0 takes the most likely token each time, so every run gives the same text. Above 0
tokens are drawn by chance, and --seed makes a run repeatable.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from nomatmul.cli.options import json_option, kv_option, option
from nomatmul.cli.sampling import (
    checked_text,
    load_model,
    sampling_of,
    show_speed,
    tokens_per_second,
    unescape,
)
from nomatmul.cli.show import print_json

EXAMPLES = r"""
examples:
  nomatmul generate "The river"                                  the model in the box
  nomatmul generate "The river" --seed 1 --max-tokens 50 --echo
  nomatmul generate "The river" --temperature 0
  nomatmul generate --model my-model-packed "Q: 2+2?" --stop "\n" --max-tokens 20
  cat opening.txt | nomatmul generate - > continued.txt
  nomatmul generate "The river" --json | jq .tokens_per_second
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    text: str | None = option(
        None, positional=True, metavar="TEXT", help="the text to continue; - is standard input"
    )
    model: str | None = option(
        None,
        metavar="MODEL",
        help="packed model directory, or hf:owner/name[@revision] (default: the model in the box)",
    )
    prompt: str | None = option(None, metavar="TEXT", help="the same as TEXT alone")
    max_tokens: int = option(200, metavar="N", help="stop after so many tokens")
    temperature: float = option(0.8, metavar="T", help="0 takes the most likely token")
    top_k: int = option(0, metavar="K", help="sample among the K most likely tokens (0: all)")
    top_p: float = option(0.95, metavar="P", help="sample among the tokens that make up this share")
    min_p: float = option(
        0.0, metavar="P", help="drop tokens less likely than this share of the most likely one"
    )
    repetition_penalty: float = option(
        1.0, metavar="R", help="above 1 makes tokens that were used less likely"
    )
    seed: int | None = option(None, metavar="S", help="makes sampling repeatable")
    stop: tuple[str, ...] = option(
        (), metavar="TEXT", help=r"end before this text (\n is a new line); may be repeated"
    )
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    echo: bool = option(False, help="print the prompt in front of its continuation")
    json: bool = json_option()


def _prompt(options: Options) -> str:
    if options.text is not None and options.prompt is not None:
        raise ValueError("the prompt is given twice; give TEXT or --prompt TEXT")
    prompt = options.text if options.prompt is None else options.prompt
    if prompt is None:
        raise ValueError('there is no prompt; try nomatmul generate "The river"')
    if prompt == "-":  # the last line's end belongs to the pipe, not to the text
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip("\r\n"):
        raise ValueError("the prompt is empty; give --prompt TEXT, or - and text on standard input")
    return prompt


def run(options: Options) -> int:
    start = time.perf_counter()
    prompt = _prompt(options)
    lm, prompt = load_model(options), checked_text(prompt)
    stream = lm.stream(
        prompt,
        max_tokens=options.max_tokens,
        sampling=sampling_of(options),
        stop=[unescape(text) for text in options.stop],
    )
    if options.echo and not options.json:
        print(prompt, end="", flush=True)
    pieces: list[str] = []
    times: list[float] = []
    for piece in stream:
        times.append(time.perf_counter())
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    tokens = len(stream.token_ids)
    if not options.json:
        print(flush=True)
        show_speed(tokens, times)
        return 0
    print_json(
        {
            "prompt": prompt,
            "text": "".join(pieces),
            "tokens": tokens,
            "prompt_tokens": len(stream.prompt_ids),
            "finish_reason": stream.finish_reason,
            "tokens_per_second": tokens_per_second(tokens, times),
            "seconds_to_first_token": times[0] - start if times else None,
            "model": str(lm.path),
        }
    )
    return 0
