"""What `chat` talks to: a model through its chat template, or one that goes on from a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.cli.sampling import unescape

if TYPE_CHECKING:
    from nomatmul.engine.chat import Chat
    from nomatmul.engine.generation import TextStream
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.sampling import Sampling

# Where neither the command nor the model's generation_config.json says it.
_SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.0}
_SAMPLING_PLAIN = {**_SAMPLING, "repetition_penalty": 1.1}
# What the file leaves out changes nothing.
_NEUTRAL = {"temperature": 1.0}
_TOKENS, _TOKENS_PLAIN = 1000, 200


def open_conversation(lm: LanguageModel, options: Any) -> Chat | Continuation:
    """The conversation that the options of `chat` ask for.

    Raises ValueError for options that do not go together, or with this model.
    """
    from nomatmul.formats.chat_template import find_template

    given = lm.path is not None and options.template and find_template(lm.path) is not None
    if not given:
        if options.system is not None or not options.thinking:
            word = "--system" if options.system is not None else "--no-thinking"
            why = "--no-template" if not options.template else "this model has no chat template"
            raise ValueError(f"{word} is for models with a chat template: {why}")
        return Continuation(lm, unescape(options.prefix), unescape(options.suffix))
    if options.prefix or options.suffix:
        word = "--prefix" if options.prefix else "--suffix"
        raise ValueError(f"{word} goes with --no-template: this model has a chat template")
    from nomatmul.engine.chat import Chat

    names = {} if options.thinking else {"enable_thinking": False}
    try:
        return Chat(lm, system=options.system, options=names)
    except ImportError as error:
        raise ImportError(f"{error}, or chat with --no-template") from None


def settings(lm: LanguageModel, options: Any, plain: bool) -> tuple[Sampling, int]:
    """(how tokens are chosen, how many a turn): as the command says, else the model, else as ever.

    Raises ValueError for a value that cannot be.
    """
    from nomatmul.engine.sampling import Sampling
    from nomatmul.formats.generation_config import sampling_defaults

    found = {} if lm.path is None else sampling_defaults(lm.path)
    values = {**_NEUTRAL, **found} if found else dict(_SAMPLING_PLAIN if plain else _SAMPLING)
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: getattr(options, name) for name in fields}
    values |= {name: value for name, value in given.items() if value is not None}
    tokens = options.max_tokens
    if tokens is None:
        tokens = _TOKENS_PLAIN if plain else _TOKENS
    return Sampling(**values), tokens


class Continuation:
    """A text that is written together with a model: as `engine.chat.Chat`, without a template."""

    def __init__(self, lm: LanguageModel, prefix: str, suffix: str) -> None:
        self.lm, self.prefix, self.suffix = lm, prefix, suffix
        self.session = lm.session()

    def reset(self) -> None:
        """Forget everything."""
        self.session = self.lm.session()

    def save(self, path: str | Path) -> None:
        """Write the state to a file."""
        self.session.save(path)

    def load(self, path: str | Path) -> None:
        """Go on from such a file."""
        self.session = self.lm.session(path)

    def ask(self, content: str, **options: Any) -> PlainTurn:
        """Go on from a text. Options as of `LanguageModel.stream`."""
        reused = self.session.position
        stream = self.lm.stream(
            self.prefix + content + self.suffix, session=self.session, **options
        )
        state = "continued" if reused else "new"
        return PlainTurn(stream, state, reused, len(stream.prompt_ids))


@dataclass(frozen=True)
class PlainTurn:
    """As `engine.chat.Turn`."""

    stream: TextStream
    state: str
    reused: int
    computed: int

    def __iter__(self) -> Iterator[str]:
        return iter(self.stream)

    def close(self) -> None:
        """End the answer early."""
        self.stream.close()
