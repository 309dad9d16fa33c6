"""A conversation as a model reads it, and the plain template of models that have none."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomatmul.engine.text import encoding_of
from nomatmul.serve.limits import check_size

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.formats.chat_template import Message


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    boundaries: ascending positions behind the ends of messages, where the tokens show them.
    """

    ids: tuple[int, ...]
    boundaries: tuple[int, ...]
    text: str


def plain_text(messages: Sequence[Message]) -> tuple[str, list[int]]:
    """(text, where each message ends in it) of the plain template.

    An answer goes on directly behind what was said before it; everything else begins a line.
    """
    text, ends = "", []
    for message in messages:
        if text and message["role"] != "assistant":
            text += "\n"
        text += message.get("content") or ""
        ends.append(len(text))
    return text, ends


def plain_rendered(lm: LanguageModel, messages: Sequence[Message]) -> Rendered:
    """A conversation by the plain template, as token ids; errors of `LanguageModel.prompt_ids`."""
    text, ends = plain_text(messages)
    check_size(len(text))
    ids = lm.prompt_ids(text)
    encoding = encoding_of(lm.tokenizer, text)
    first = len(ids) - len(encoding.ids)  # the start token, where the model has one
    places = [end for _, end in encoding.offsets]
    found = sorted({first + bisect.bisect_right(places, end) for end in ends} - {first})
    return Rendered(tuple(ids), tuple(found), text)
