"""Write a text together with a model: it goes on from what you type, and remembers all of it.

The model's state is kept between turns, so a turn costs only its own new words. A pasted block of
several lines is one turn. Ctrl-C stops the model in mid-sentence (what it wrote stays) or drops a
half-typed line; Ctrl-D or /exit ends. Lines that you typed can be recalled, in later sessions too.
With --json each turn gives one line, a JSON object.

  /help         these commands           /reset        forget everything
  /save FILE    keep the state           /load FILE    go on from such a file
  /exit         end (so does /quit)
A text that begins with a slash: put a space in front of it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomatmul.cli import one_line
from nomatmul.cli.options import option
from nomatmul.cli.sampling import (
    checked_text,
    load_model,
    sampling_of,
    show_speed,
    unescape,
)
from nomatmul.cli.show import json_text
from nomatmul.cli.terminal import MODEL, line_editing, read_turn, terminal_writer

if TYPE_CHECKING:
    from nomatmul.engine.generation import TextStream
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session

EXAMPLES = r"""
examples:
  nomatmul chat
  nomatmul chat --model my-model-packed --temperature 0.8 --seed 1
  nomatmul chat --stop "\n" --prefix "User: " --suffix "\nAssistant:"
  printf 'The old man\n/save sea.state\n' | nomatmul chat --max-tokens 30
  printf 'The old man\n' | nomatmul chat --json | jq -r .text
"""

COMMANDS = {
    "/help": "list these commands",
    "/reset": "forget everything",
    "/save FILE": "keep the state in a file",
    "/load FILE": "go on from such a file",
    "/exit": "end the conversation (so do /quit and Ctrl-D)",
}


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
        print("Type a beginning; the model goes on. /help lists commands.", file=sys.stderr)
    with line_editing():
        while (turn := read_turn()) is not None:
            try:
                if not chat.answer(turn):
                    break
            except (ValueError, OSError) as error:  # a wrong file name must not end all of it
                if isinstance(error, BrokenPipeError):
                    raise
                print(f"nomatmul: error: {one_line(error)}", file=sys.stderr)
    return 0


class Conversation:
    """One sequence, and what a turn does to it."""

    def __init__(self, lm: LanguageModel, options: Options) -> None:
        self.lm, self.turns = lm, 0
        self.prefix, self.suffix = unescape(options.prefix), unescape(options.suffix)
        self.sampling = sampling_of(options)
        self.stop = [unescape(text) for text in options.stop]
        self.max_tokens = options.max_tokens
        self._stream([0])  # refuses bad options before the first turn
        self.json = options.json
        self.session = lm.session()

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
        if word in ("/exit", "/quit"):
            return False
        if word == "/help":
            lines = (f"  {name:12}{text}" for name, text in COMMANDS.items())
            print("\n".join(lines), file=sys.stderr)
        elif word == "/reset":
            self.session = self.lm.session()
        elif word == "/save":
            self.session.save(argument)
            print(f"saved {self.session.position} tokens of context to {argument}", file=sys.stderr)
        elif word == "/load":
            self.session = self.lm.session(argument)
            print(f"went back to {self.session.position} tokens of context", file=sys.stderr)
        else:
            raise ValueError(f"{word} is no command; {', '.join(COMMANDS)} are")
        return True

    def _continue(self, text: str) -> None:
        stream = self._stream(checked_text(text), self.session)
        self.turns += 1
        pieces: list[str] = []
        times: list[float] = []
        wrap = None if self.json else terminal_writer(len(MODEL))
        if wrap is not None:
            print(MODEL, end="", flush=True)
        try:
            for piece in stream:
                times.append(time.perf_counter())
                pieces.append(piece)
                if wrap is not None:
                    wrap.push(piece)
                elif not self.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        if wrap is not None:
            wrap.finish()
        if self.json:
            self._print_turn(text, "".join(pieces), stream)
        print(flush=True)
        if not self.json:
            show_speed(len(stream.token_ids), times)

    def _stream(self, prompt: str | list[int], session: Session | None = None) -> TextStream:
        sampling = self.sampling
        if sampling.seed is not None:  # each turn draws anew, and all of them repeatably
            sampling = dataclasses.replace(sampling, seed=sampling.seed + self.turns)
        return self.lm.stream(
            prompt, max_tokens=self.max_tokens, sampling=sampling, stop=self.stop, session=session
        )

    def _print_turn(self, prompt: str, text: str, stream: TextStream) -> None:
        turn = {
            "prompt": prompt,
            "text": text,
            "tokens": len(stream.token_ids),
            "finish_reason": stream.finish_reason or "interrupted",
            "context": self.session.position,
        }
        print(json_text(turn), end="")
