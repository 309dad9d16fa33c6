"""Editing, asking again and branching through the API: exactly the new tokens are computed."""

from __future__ import annotations

import httpx
from support.serving import running_server

BOX = "nomatmul-box"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_ten_turns_of_editing_and_branching_compute_the_new_tokens_only() -> None:
    first, again = said("user", "Tell me of the sea."), said("user", "Tell me of the old harbour.")
    reply, more = said("assistant", " Zebras run."), said("user", "And then?")
    turns = [
        [first],
        [first],  # the same once more
        [first, reply, more],
        [first, reply, said("user", "But why?")],  # the last question edited
        [again],  # the first one, too
        [again, said("assistant", " Quite so!"), more],
        [first, reply, more],  # back in the other branch
        [first, reply, more, said("assistant", " Yes, 1999."), said("user", "Where was that?")],
        [first, said("assistant", " Kings rule."), more],  # an answer edited
        [first, reply, more, said("assistant", " Yes, 1999."), said("user", "When was that?")],
    ]
    known: list[tuple[int, ...]] = []  # what there should be a snapshot behind
    with running_server() as running:
        model = running.server.models[BOX]
        for turn, messages in enumerate(turns):
            body = {"model": BOX, "messages": messages, "max_tokens": 3, "temperature": 0}
            answer = httpx.post(f"{running.url}/v1/chat/completions", json=body).json()
            rendered = model.chat_ids(messages)
            ids = rendered.ids
            reached = max((len(k) for k in known if ids[: len(k)] == k), default=0)
            assert answer["nomatmul"]["cached_tokens"] == reached, turn
            assert answer["nomatmul"]["computed_tokens"] == len(ids) - reached, turn
            known += [ids[:end] for end in (*rendered.boundaries, len(ids))]
    assert reached > 0
