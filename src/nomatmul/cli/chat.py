"""Write a text together with a model: it goes on from what you type, and remembers all of it.

The model's state is kept between turns, so a turn costs only its own new words. A pasted block of
several lines is one turn. Ctrl-C stops the model in mid-sentence (what it wrote stays); at the
prompt it leaves, as Ctrl-D and /quit do. With --json each turn gives one line, a JSON object.

  /reset        forget everything        /save FILE    keep the state in a file
  /load FILE    go on from such a file   /quit         leave
"""

from __future__ import annotations

import contextlib
import json
import select
import sys
from dataclasses import dataclass
from typing import Any

from nomatmul.cli import one_line
from nomatmul.cli.options import option
from nomatmul.cli.sampling import checked_text, load_model, sampling_arguments, unescape

EXAMPLES = r"""
examples:
  nomatmul chat
  nomatmul chat --model my-model-packed --temperature 0.8 --seed 1
  nomatmul chat --stop "\n" --prefix "User: " --suffix "\nAssistant:"
  printf 'The old man\n/save sea.state\n' | nomatmul chat --max-tokens 30
  printf 'The old man\n' | nomatmul chat --json | jq -r .text
"""

PASTE_SECONDS = 0.05  # lines that come faster after each other than that were pasted


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
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    json: bool = option(False, help="print one JSON object a turn instead of text")


def run(options: Options) -> int:
    lm = load_model(options)
    chat = Conversation(lm, options)
    if sys.stdin.isatty():
        print(
            "Type a beginning; the model goes on. /reset /save FILE /load FILE /quit",
            file=sys.stderr,
        )
    while True:
        turn = read_turn()
        if turn is None:
            return 0
        try:
            if not chat.answer(turn):
                return 0
        except (ValueError, OSError) as error:  # a wrong file name must not end the conversation
            print(f"nomatmul: error: {one_line(error)}", file=sys.stderr)


class Conversation:
    """One sequence, and what a turn does to it."""

    def __init__(self, lm: Any, options: Options) -> None:
        self.lm = lm
        self.prefix, self.suffix = unescape(options.prefix), unescape(options.suffix)
        self.sampling = sampling_arguments(options)
        lm.stream([0], **self.sampling)  # refuses bad options before the first turn
        self.json = options.json
        self.session = lm.session()
        self.turns = 0

    def answer(self, turn: str) -> bool:
        """Obey a command or go on from a text; False means that the conversation is over."""
        if turn.startswith("/") and "\n" not in turn:  # a pasted block is never a command
            return self._command(turn)
        if turn:
            self._continue(self.prefix + turn + self.suffix)
        return True

    def _command(self, turn: str) -> bool:
        word, _, argument = turn.partition(" ")
        argument = argument.strip()
        if word in ("/save", "/load") and not argument:
            raise ValueError(f"{word} needs the name of a file")
        if word == "/quit":
            return False
        if word == "/reset":
            self.session = self.lm.session()
        elif word == "/save":
            self.session.save(argument)
            print(f"saved {self.session.position} tokens of context to {argument}", file=sys.stderr)
        elif word == "/load":
            self.session = self.lm.session(argument)
            print(f"went back to {self.session.position} tokens of context", file=sys.stderr)
        else:
            raise ValueError(f"{word} is no command; /reset /save FILE /load FILE /quit are")
        return True

    def _continue(self, text: str) -> None:
        sampling = dict(self.sampling)
        if sampling["seed"] is not None:  # each turn draws anew, and all of them repeatably
            sampling["seed"] += self.turns
        self.turns += 1
        stream = self.lm.stream(checked_text(text), session=self.session, **sampling)
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                if not self.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        if self.json:
            self._print_turn(text, "".join(pieces), stream)
        print(flush=True)

    def _print_turn(self, prompt: str, text: str, stream: Any) -> None:
        turn = {
            "prompt": prompt,
            "text": text,
            "tokens": len(stream.token_ids),
            "finish_reason": stream.finish_reason or "interrupted",
            "context": self.session.position,
        }
        print(json.dumps(turn, ensure_ascii=False), end="")


def read_turn() -> str | None:
    """The next block that was typed or pasted, None at the end of input.

    At a terminal, lines that arrive together (a paste) are one turn; in a pipe a line is a turn.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):  # line editing and history, where Python has them
        import readline  # noqa: F401
    try:
        lines = [input("> ")]
    except EOFError:
        print()
        return None
    while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)
