"""Write a text together with a model: it goes on from what you type, and remembers all of it.

The model's state is kept between turns, so a turn costs only its own new words. A pasted block of
several lines is one turn. Ctrl-C stops the model in mid-sentence (what it wrote stays); at the
prompt it leaves, as Ctrl-D and /quit do.

  /reset        forget everything        /save FILE    keep the state in a file
  /load FILE    go on from such a file   /quit         leave
"""

from __future__ import annotations

import select
import sys
from dataclasses import dataclass
from typing import Any

from nomatmul.cli.options import option

EXAMPLES = r"""
examples:
  nomatmul chat
  nomatmul chat --model my-model-packed --temperature 0.8 --seed 1
  nomatmul chat --stop "\n" --prefix "User: " --suffix "\nAssistant:"
  printf 'The old man\n/save sea.state\n' | nomatmul chat --max-tokens 30
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None, metavar="DIR", help="packed model directory (default: the model in the box)"
    )
    max_tokens: int = option(200, metavar="N", help="tokens a turn at most")
    temperature: float = option(0.8, metavar="T", help="0 takes the most likely token")
    top_k: int = option(0, metavar="K", help="sample among the K most likely tokens (0: all)")
    top_p: float = option(0.95, metavar="P", help="sample among the tokens of this share")
    min_p: float = option(0.0, metavar="P", help="drop tokens below this share of the best one")
    repetition_penalty: float = option(1.1, metavar="R", help="above 1 avoids repetition")
    seed: int | None = option(None, metavar="S", help="makes sampling repeatable")
    stop: tuple[str, ...] = option(
        (), metavar="TEXT", help=r"ends a turn (\n is a new line); may be repeated"
    )
    prefix: str = option("", metavar="TEXT", help="put in front of what you type")
    suffix: str = option("", metavar="TEXT", help="put behind what you type")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
