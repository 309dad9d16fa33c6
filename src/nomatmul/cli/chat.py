"""Talk with a model, or write a text together with one; it remembers all of it.

A model that was trained for conversations has a chat template, which puts what you type and what it
answers into the words that it was trained on (jinja2, the extra `chat`). One without, or any with
--no-template, goes on from what you type. Options of sampling that you leave out are those of the
model's generation_config.json, or else: temperature 0.8, top-p 0.95, and without template
repetition penalty 1.1.

The model's state is kept between turns, so a turn costs only its own new words; where a template
changes what was said before (it may leave thoughts out), the state goes back, or starts again. A
pasted block of several lines is one turn. Ctrl-C stops the model in mid-sentence (what it wrote
stays) or drops a half-typed line; Ctrl-D or /exit ends. Lines that you typed can be recalled, in
later sessions too. Where the input is no terminal, a turn or command that failed makes the exit
status 1 at the end. With --json each turn gives one line, a JSON object, which also says what was
used: the state of how many tokens, the sampling, whether a template.

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
from nomatmul.cli.conversation import Continuation, open_conversation, settings
from nomatmul.cli.options import kv_option, option
from nomatmul.cli.sampling import (
    SAMPLING_OPTIONS,
    checked_text,
    load_model,
    show_speed,
    unescape,
)
from nomatmul.cli.show import json_text
from nomatmul.cli.terminal import MODEL, line_editing, read_turn, terminal_writer

if TYPE_CHECKING:
    from nomatmul.cli.conversation import PlainTurn
    from nomatmul.engine.chat import Turn
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.sampling import Sampling

EXAMPLES = r"""
examples:
  nomatmul chat
  nomatmul chat --model hf:owner/name --system "Be brief."
  nomatmul chat --model my-model-packed --temperature 0.8 --seed 1
  nomatmul chat --no-template --stop "\n" --prefix "User: " --suffix "\nAssistant:"
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
        None,
        metavar="MODEL",
        help="packed model directory, or hf:owner/name[@revision] (default: the model in the box)",
    )
    system: str | None = option(
        None, metavar="TEXT", help="what the model is told before the conversation"
    )
    template: bool = option(True, help="use the model's chat template, if it has one")
    thinking: bool = option(True, help="let a model think before it answers, if it can")
    max_tokens: int | None = option(
        None, metavar="N", help="tokens a turn at most (default: 200, with a template 1000)"
    )
    temperature: float | None = option(
        None, metavar="T", help="0 takes the most likely token (default: the model's, else 0.8)"
    )
    top_k: int | None = option(
        None,
        metavar="K",
        help="sample among the K most likely tokens, 0: all (default: the model's, else 0)",
    )
    top_p: float | None = option(
        None,
        metavar="P",
        help="sample among the tokens of this share (default: the model's, else 0.95)",
    )
    min_p: float | None = option(
        None,
        metavar="P",
        help="drop tokens below this share of the best one (default: the model's, else 0)",
    )
    repetition_penalty: float | None = option(
        None,
        metavar="R",
        help="above 1 avoids repetition (default: the model's, else 1, without template 1.1)",
    )
    seed: int | None = option(None, metavar="S", help="makes sampling repeatable")
    stop: tuple[str, ...] = option(
        (), metavar="TEXT", help=r"ends a turn (\n is a new line); may be repeated"
    )
    prefix: str = option("", metavar="TEXT", help="without template: in front of what you type")
    suffix: str = option("", metavar="TEXT", help="without template: behind what you type")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    json: bool = option(False, help="print one JSON object a turn instead of text")


def run(options: Options) -> int:
    lm = load_model(options, talking=True)
    chat, failed = Conversation(lm, options), False
    if sys.stdin.isatty():
        print(f"{chat.greeting} /help lists commands.", file=sys.stderr)
    with line_editing():
        while (turn := read_turn()) is not None:
            try:
                if not chat.answer(turn):
                    break
            except (ValueError, OSError) as error:  # a wrong file name must not end all of it
                if isinstance(error, BrokenPipeError):
                    raise
                print(f"nomatmul: error: {one_line(error)}", file=sys.stderr)
                failed = True
    return int(failed and not sys.stdin.isatty())  # a script is told at the end, a person was


class Conversation:
    """What is said to a model turn by turn, and commands."""

    def __init__(self, lm: LanguageModel, options: Options) -> None:
        self.lm, self.turns = lm, 0
        self.chat = open_conversation(lm, options)
        self.plain = isinstance(self.chat, Continuation)
        self.sampling, self.max_tokens = settings(lm, options, self.plain)
        self.stop = [unescape(text) for text in options.stop]
        # refuses bad options before the first turn
        lm.stream([0], max_tokens=self.max_tokens, sampling=self.sampling, stop=self.stop)
        self.json = options.json

    @property
    def greeting(self) -> str:
        """What a person may do now."""
        return "Type a beginning; the model goes on." if self.plain else "Type a message."

    def answer(self, turn: str) -> bool:
        """Obey a command or answer; False means that the conversation is over."""
        if turn.startswith("/") and "\n" not in turn:  # a pasted block is never a command
            return self._command(turn)
        if turn:
            self._answer(checked_text(turn))
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
            self.chat.reset()
        elif word == "/save":
            self.chat.save(argument)
            print(f"saved {self._position} tokens of context to {argument}", file=sys.stderr)
        elif word == "/load":
            self.chat.load(argument)
            print(f"went back to {self._position} tokens of context", file=sys.stderr)
        else:
            raise ValueError(f"{word} is no command; {', '.join(COMMANDS)} are")
        return True

    @property
    def _position(self) -> int:
        return self.chat.session.position

    def _answer(self, text: str) -> None:
        sampling = self.sampling
        if sampling.seed is not None:  # each turn draws anew, and all of them repeatably
            sampling = dataclasses.replace(sampling, seed=sampling.seed + self.turns)
        turn = self.chat.ask(text, max_tokens=self.max_tokens, sampling=sampling, stop=self.stop)
        self.turns += 1
        pieces: list[str] = []
        times: list[float] = []
        wrap = None if self.json else terminal_writer(len(MODEL))
        if wrap is not None:
            print(MODEL, end="", flush=True)
        try:
            for piece in turn:
                times.append(time.perf_counter())
                pieces.append(piece)
                if wrap is not None:
                    wrap.push(piece)
                elif not self.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            turn.close()
        if wrap is not None:
            wrap.finish()
        if self.json:
            self._print_turn(text, "".join(pieces), turn, sampling)
        print(flush=True)
        if not self.json:
            self._show_state(turn)
            show_speed(len(turn.stream.token_ids), times)

    def _show_state(self, turn: Turn | PlainTurn) -> None:
        """A line where more than the new words was computed, for a person who waited for it."""
        if sys.stderr.isatty() and turn.state in ("rolled back", "started again"):
            print(
                f"[the template changed what was said: {turn.state}, {turn.computed} tokens"
                " computed]",
                file=sys.stderr,
            )

    def _print_turn(
        self, prompt: str, text: str, turn: Turn | PlainTurn, sampling: Sampling
    ) -> None:
        if isinstance(self.chat, Continuation):
            prompt = self.chat.prefix + prompt + self.chat.suffix
        answer = {
            "prompt": prompt,
            "text": text,
            "tokens": len(turn.stream.token_ids),
            "finish_reason": turn.stream.finish_reason or "interrupted",
            "context": self._position,
            "template": not self.plain,
            "state": turn.state,
            "reused_tokens": turn.reused,
            "computed_tokens": turn.computed,
            "sampling": {name: getattr(sampling, name) for name in SAMPLING_OPTIONS},
        }
        print(json_text(answer), end="")
