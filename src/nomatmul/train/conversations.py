"""Conversations as training text: rows of messages, rendered by a chat template.

    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]}

A conversation is one document. Its special tokens come from the template alone: what spells one in
a message is ordinary text, as everywhere (`engine.chat_text`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.engine.chat_text import ChatText
from nomatmul.formats.chat_template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    ChatTemplate,
    find_template,
    read_template,
)
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import write_json
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.special_tokens import CHAT_TOKENS, special_ids
from nomatmul.formats.template_budget import MAX_SIZE

FIELD = "messages"
ROLES = ("system", "user", "assistant")
LOOK = 1000  # documents of a file, or parts of long ones, among which its first conversation is


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in order: (role, content)."""

    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """What is said, without who says it: what a tokenizer is trained on."""
        return "\n".join(content for _, content in self.messages)

    def __len__(self) -> int:
        """Characters of all that is said."""
        return sum(len(content) for _, content in self.messages)

    def to_json(self) -> str:
        """Its messages as one line."""
        return json.dumps(self.messages, ensure_ascii=False)


def conversation_of(messages: Any) -> Conversation:
    """The conversation of a row's messages. Raises ValueError saying which message is no such."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{FIELD!r} must be a list of messages, found {type(messages).__name__}")
    found = Conversation(tuple(_message(entry, n) for n, entry in enumerate(messages, 1)))
    if len(found) > MAX_SIZE:
        raise ValueError(f"{FIELD!r} have {len(found):,} characters, at most {MAX_SIZE:,} are read")
    return found


def _message(entry: Any, number: int) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} must be an object, found {type(entry).__name__}")
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; {', '.join(ROLES)} are known")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise ValueError(f"message {number} needs a text under 'content', found {kind}")
    more = [key for key, value in entry.items() if key not in ("role", "content") and value]
    if more:
        raise ValueError(f"message {number} has {more[0]!r} beside role and content")
    return role, content.encode("utf-8", "replace").decode("utf-8")


def template_beside(tokenizer_file: str | Path | None) -> str:
    """The chat template in a tokenizer's directory, else the default one. Raises FormatError."""
    if tokenizer_file is None:
        return DEFAULT_TEMPLATE
    path = Path(tokenizer_file)
    return find_template(path if path.is_dir() else path.parent) or DEFAULT_TEMPLATE


def stored_template(directory: str | Path) -> str | None:
    """The chat template of a token directory with conversations."""
    file = Path(directory) / TEMPLATE_FILE
    return read_template(file) if file.is_file() else None


def token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What a template may put in by name: the special tokens that a trained model will name."""
    special = special_ids(tokenizer)
    ids = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
    names = {key: tokenizer.id_to_token(index) for key, index in ids.items() if index is not None}
    return {key: name for key, name in names.items() if name is not None}


class ConversationEncoder:
    """Conversations to ids. path: the tokenizer's file or directory.

    Raises ValueError for a template that is unsafe or spells tokens that the tokenizer lacks.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path, template: str) -> None:
        if template == DEFAULT_TEMPLATE:
            check_tokens(tokenizer)
        self._special = special_ids(tokenizer)
        compiled = ChatTemplate(template, token_names(tokenizer))
        self._text = ChatText(compiled, path, ordinary=tokenizer)

    def ids(self, conversation: Conversation) -> list[int]:
        """Ids without the tokens that start and end a document. Raises ValueError."""
        messages = [{"role": role, "content": text} for role, text in conversation.messages]
        ids = self._text.ids(self._text.render(messages, add_generation_prompt=False))
        if ids and ids[0] == self._special.bos:
            ids = ids[1:]
        return ids[:-1] if ids and ids[-1] == self._special.eos else ids

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """What ends an answer: the template's token, then that of a document."""
        return tuple(dict.fromkeys([*self._text.ends, self._special.eos]))


def check_tokens(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer without the tokens of the default template."""
    missing = [name for name in CHAT_TOKENS if tokenizer.token_to_id(name) is None]
    if missing:
        raise ValueError(
            f"the data has conversations, and the tokenizer lacks {', '.join(missing)}: give one"
            " that has them or whose directory holds a chat template, or let a run train its own,"
            f" on data with a conversation among the first {LOOK:,} rows of a file"
        )


def write_chat(directory: Path, tokenizer: Tokenizer, template: str) -> None:
    """Beside a model and its tokenizer.json: the template, and what ends an answer."""
    write_file(directory / TEMPLATE_FILE, template.encode("utf-8"))
    file = directory / GENERATION_FILE
    values = read_json_object(file) if file.is_file() else {}
    values.pop("_from_model_config", None)  # it is no longer
    ends = ConversationEncoder(tokenizer, directory, template).ends
    write_json(file, values | {"eos_token_id": list(ends)})
