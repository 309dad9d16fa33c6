"""An application called without a network, and the metrics of several."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from nomatmul.serve.asgi_calls import call
from nomatmul.serve.replica_router import merged


def test_an_answer_comes_message_by_message():
    async def app(scope, receive, send):
        request = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": request["body"] * 2})

    async def run():
        return [message async for message in call(app, {"path": "/"}, b"ab")]

    start, body = asyncio.run(run())
    assert (start["status"], body["body"]) == (200, b"abab")


def test_who_stops_listening_is_a_client_that_went_away():
    seen = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def run():
        async with contextlib.aclosing(call(app, {}, b"")) as messages:
            await anext(messages)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert seen == ["http.disconnect"]


def test_what_the_application_raises_is_raised():
    async def app(scope, receive, send):
        raise KeyError("of the application")

    async def run():
        return [message async for message in call(app, {}, b"")]

    with pytest.raises(KeyError, match="of the application"):
        asyncio.run(run())


def test_metrics_of_replicas_stand_side_by_side():
    page = '# HELP a A.\n# TYPE a counter\na_total{model="m"} 1.0\na_created 5.0\n'
    other = page.replace("1.0", "2.0") + "# HELP b B.\n# TYPE b gauge\nb 3.0\n"
    assert merged({0: page, 1: other}).splitlines() == [
        "# HELP a A.",
        "# TYPE a counter",
        'a_total{replica="0",model="m"} 1.0',
        'a_created{replica="0"} 5.0',
        'a_total{replica="1",model="m"} 2.0',
        'a_created{replica="1"} 5.0',
        "# HELP b B.",
        "# TYPE b gauge",
        'b{replica="1"} 3.0',
    ]
