"""The router of replicas, without Ray: what it counts of a replica's load."""

from __future__ import annotations

import asyncio
import contextlib

from nomatmul.serve.options import ServeOptions
from nomatmul.serve.replica_router import Router


class Answer:
    """An answer of one message; notes whether it was cancelled."""

    streams, cancelled = False, False

    async def __aiter__(self):
        yield {"type": "http.response.body", "body": b"text"}

    def cancel(self) -> None:
        self.cancelled = True


def handed_on(receive, send) -> tuple[Router, Answer]:
    """Hand one answer on over an ASGI connection, as `Router._forward` does."""
    router, answer = Router([object()], ServeOptions()), Answer()
    router._load[0] += 1
    response = router._response(0, answer, 200)
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}}
    with contextlib.suppress(Exception):  # starlette has a name of its own for clients that left
        asyncio.run(response(scope, receive, send))
    return router, answer


async def receive():
    await asyncio.sleep(3600)


def test_an_answer_that_has_ended_is_no_load():
    sent = []

    async def send(message):
        sent.append(message)

    router, answer = handed_on(receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"text"
    assert router._load == {0: 0}
    assert answer.cancelled


def test_a_client_that_left_before_the_first_byte_is_no_load():
    async def send(message):
        raise ConnectionError

    router, answer = handed_on(receive, send)
    assert router._load == {0: 0}
    assert answer.cancelled
