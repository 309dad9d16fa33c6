"""Dialogues as rows of messages, cleaned: what the talking model is tuned on.

Crowd workers typed the chats, so the tidiest are taken: conversations whose turns begin with
capitals and end with a mark. `parts` names where each comes from. A library of texts.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from studies.recipes.clean import clean

Messages = list[dict[str, str]]

_TURN = re.compile(r"^(A|B|User|Assistant): ", re.MULTILINE)
_ROLES = {"A": "user", "B": "assistant", "User": "user", "Assistant": "assistant"}
_LAST_MARK = re.compile(r"[.!?)\"']$")
UNTIDY = 0.3  # share of turns that may begin with a small letter or end without a mark
SHORTEST = 4  # turns of a chat
_QUESTION = ("{passage}\n\n{question}", "Read this story.\n\n{passage}\n\n{question}",
             "{passage}\n\nI have a question. {question}")  # fmt: skip


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """(what stands before the first turn, (role, cleaned content) of each turn in order).

    Turns in a row of one speaker become one; behind one of which nothing is left, all is cut off.
    """
    before, *rest = _TURN.split(text)
    found: list[tuple[str, str]] = []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        role, content = _ROLES[speaker], " ".join(clean(content).split())
        if not content:
            break
        if found and found[-1][0] == role:
            content = f"{found.pop()[1]} {content}"
        found.append((role, content))
    return clean(before), found


def chat(text: str, draw: random.Random) -> Messages | None:
    """A chat of two people, who take the roles in turn; None for an untidy or too short one.

    The assistant has the last word.
    """
    _, found = turns(text)
    if found and found[0][0] == "assistant":
        found = found[1:]
    if len(found) % 2:
        found = found[:-1]
    untidy = sum(c[0].islower() or not _LAST_MARK.search(c) for _, c in found)
    if len(found) < SHORTEST or untidy > UNTIDY * len(found):
        return None
    return [message(role, _tidy(content)) for role, content in found]


def _tidy(content: str) -> str:
    """A turn that begins with a capital and ends with a mark; loose spaces before marks go."""
    content = re.sub(r" +([,.!?;])", r"\1", re.sub(r"\bi\b(?!\.)", "I", content))
    content = content[0].upper() + content[1:]
    return content if _LAST_MARK.search(content) else content + "."


def about_passage(text: str, draw: random.Random) -> Messages | None:
    """A passage and the first question about it in one turn, or the passage as the system's."""
    passage, found = turns(text)
    if not passage or len(found) < 2 or found[0][0] != "user":
        return None
    found = found[: len(found) // 2 * 2]
    messages = [message(role, _tidy(content)) for role, content in found]
    if draw.random() < 0.25:
        return [message("system", passage), *messages]
    first = draw.choice(_QUESTION).format(passage=passage, question=messages[0]["content"])
    return [message("user", first), *messages[1:]]


def rows(documents: list[str], form: Callable, draw: random.Random) -> Iterator[Messages]:
    """The conversations of documents, each once."""
    seen = set()
    for document in documents:
        messages = form(document, draw)
        key = str(messages)
        if messages is not None and key not in seen:
            seen.add(key)
            yield messages
