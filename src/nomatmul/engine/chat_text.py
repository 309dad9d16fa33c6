"""Conversations as token ids: a model's chat template, with control tokens from the template alone.

A template spells special tokens; people must not be able to. What spells one in a message is
guarded before the template sees it, and is ordinary text again when the text is cut into tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nomatmul.engine.text import encoding_of
from nomatmul.formats.chat_template import ChatTemplate, Message
from nomatmul.formats.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

# In front of every character of a guarded spelling. Unicode keeps it for a program's own use, and
# it belongs to no text; where one has it nevertheless it is replaced.
_GUARD, _REPLACED = "\ufdd0", "\ufffd"
# Tokens of their own that are not special, with which some models begin and end calls of tools and
# their results. In a message they are text, too: the split in them keeps them from being tokens.
_CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_SPLIT = "\ufdd1"
_PROBE = "answer"  # what stands for an answer while the end of a turn is looked for


class ChatText:
    """The chat template of a model and its tokenizer, from the directory of the model.

    Texts that `render` makes hold guards; `ids` takes them away.
    options: names that the template may read. ordinary: the model's tokenizer, where it is at hand.
    Raises ValueError for a template that is unsafe or does not compile, ImportError without jinja2.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer_path: Path,
        options: dict[str, Any] | None = None,
        *,
        ordinary: Tokenizer | None = None,
    ) -> None:
        self._template, self._options = template, dict(options or {})
        self._ordinary: Tokenizer = ordinary or load_tokenizer(tokenizer_path)
        self._tokenizer_path = tokenizer_path
        added = self._ordinary.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in added.items() if token.special}
        names = sorted(self.special, key=len, reverse=True)  # the longest that fits
        calls = {t.content: i for i, t in added.items() if t.content in _CALLS and not t.special}
        self.call_tokens = frozenset(calls.values())
        self._calls = re.compile("|".join(map(re.escape, calls)) or "(?!)")
        any_of = "|".join(map(re.escape, names)) or "(?!)"
        self._spelt, self._parts = re.compile(any_of), re.compile(f"({any_of})")

    @functools.cached_property
    def _parsing(self) -> Tokenizer:
        """Made when first needed: a large vocabulary takes half a second."""
        return load_tokenizer(self._tokenizer_path, special_in_text=True)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """The text of a conversation; raises ValueError when the template refuses it or fails.

        options: further names that the template may read (tools), before those of the class.
        """
        guarded = [
            {key: v if key == "role" else self.guarded(v) for key, v in message.items()}
            for message in messages
        ]
        names = {**self._options, **{key: self.guarded(v) for key, v in options.items()}}
        return self._template.render(guarded, add_generation_prompt=add_generation_prompt, **names)

    def guarded(self, value: Any) -> Any:
        """A text, or what holds texts, as `render` hands it to the template."""
        if isinstance(value, str):
            text = value.replace(_GUARD, _REPLACED).replace(_SPLIT, _REPLACED)
            text = self._spelt.sub(lambda m: "".join(_GUARD + letter for letter in m[0]), text)
            return self._calls.sub(lambda m: m[0][0] + _SPLIT + m[0][1:], text)
        if isinstance(value, list | tuple):
            return [self.guarded(part) for part in value]
        if isinstance(value, dict):
            return {self.guarded(key): self.guarded(part) for key, part in value.items()}
        return value

    def shown(self, text: str) -> str:
        """A rendered text without guards, for people."""
        return text.replace(_GUARD, "").replace(_SPLIT, "")

    @property
    def source(self) -> str:
        """The text of the template."""
        return self._template.source

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text; special tokens that the template spelt are tokens."""
        if _GUARD not in text and _SPLIT not in text:
            return list(encoding_of(self._parsing, text).ids)
        found: list[int] = []
        for number, part in enumerate(self._parts.split(text)):
            if number % 2:
                found.append(self.special[part])
            elif part:
                for piece in part.replace(_GUARD, "").split(_SPLIT):
                    found += encoding_of(self._ordinary, piece).ids
        return found

    def ids_after(self, before: str, text: str) -> list[int] | None:
        """Token ids of a text that follows another one, whose tokens stay as they are.

        None where tokens would cross the border: there must be a special token on one side.
        """
        last = next((name for name in self.special if before.endswith(name)), None)
        if last is not None:
            return self.ids(last + text)[1:]
        return self.ids(text) if self._spelt.match(text) else None

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The token with which the template ends an answer, if there is one.

        Models that learned to chat later end an answer with another token than a document, and
        not every config.json says so.
        """
        messages = [{"role": "user", "content": "question"}]
        answered = [*messages, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(answered, add_generation_prompt=False)
        except ValueError:  # it wants other messages than these: then the config says it all
            return ()
        _, found, rest = text.rpartition(_PROBE)
        match = self._spelt.match(rest.lstrip()) if found else None
        return () if match is None else (self.special[match[0]],)
