"""Streams: the same bytes as whole answers, in OpenAI's order; jobs end with their clients."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from support.scripted import ask, says, scripted_server

from nomatmul.serve import sse
from nomatmul.serve.app import create_app

BOX = "nomatmul-box"
TEXT = {"model": BOX, "prompt": "The river", "max_tokens": 24, "seed": 3}
CHAT = {
    "model": BOX,
    "messages": [{"role": "user", "content": "The river"}],
    "max_tokens": 24,
    "seed": 3,
}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def events(text):
    """The chunks of a stream, which must be well-formed and end with [DONE]."""
    *parts, last = text.split("\n\n")
    assert last == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0},
        {"n": 3},
        {"echo": True},
        {"echo": True, "logprobs": 2, "n": 2},
        {"logprobs": 5},
        {"stop": " the"},
        {"prompt": ["The river", "A city"], "n": 2, "echo": True},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": "Café \U0001f600", "temperature": 2},
    ],
)
def test_streamed_text_equals_the_whole_one(server, fields):
    url, body = server.url + "/v1/completions", {**TEXT, **fields}
    whole = httpx.post(url, json=body).json()
    response = httpx.post(url, json={**body, **USAGE})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response.text)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    for expected in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks]
        parts = [part for part in parts if part["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [expected["finish_reason"]]
        if expected["logprobs"] is None:
            assert all(part["logprobs"] is None for part in parts)
            continue
        for key, values in expected["logprobs"].items():
            found = [part["logprobs"][key] for part in parts]
            assert [value for part in found for value in part or ()] == (values or [])


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": " the", "temperature": 0}],
)
def test_a_streamed_chat_equals_the_whole_one(server, fields):
    url, body = server.url + "/v1/chat/completions", {**CHAT, **fields}
    whole = httpx.post(url, json=body).json()
    *chunks, usage = events(httpx.post(url, json={**body, **USAGE}).text)
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for expected in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks]
        first, *middle, last = [part for part in parts if part["index"] == expected["index"]]
        assert first["delta"]["role"] == "assistant"
        assert last["delta"] == {}
        assert last["finish_reason"] == expected["finish_reason"]
        text = "".join(part["delta"]["content"] for part in middle)
        assert text == expected["message"]["content"]
        if expected["logprobs"] is not None:
            parts = [part["logprobs"]["content"] for part in middle if part["logprobs"]]
            assert [one for part in parts for one in part] == expected["logprobs"]["content"]


def test_usage_comes_only_where_it_was_asked_for(server):
    response = httpx.post(server.url + "/v1/completions", json={**TEXT, "stream": True})
    chunks = events(response.text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_what_is_ready_goes_out_in_one_write():
    scheduler = scripted_server(says("one", "two"))
    writes = play(scheduler, {**TEXT, "n": 2, **USAGE}).bodies
    assert len([body for body in writes if body]) == 1
    assert writes[0].count(b"data: ") == 4  # two choices, usage, [DONE]


def test_every_text_survives_a_reader_of_lines():
    odd = 'quote " back\\ \u2028\x85\r\n\x1c\x7f é 𝄞'
    server = scripted_server(says(odd))
    response = ask(server, "POST", "/v1/completions", json={**TEXT, "stream": True})
    lines = response.text.splitlines()  # which Python takes more characters for ends of lines of
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == odd


class Played:
    """What an application sent, called without a server: the client goes away on `gone`."""

    def __init__(self, full=False):
        """full: nothing that is sent finds room, as behind an answer that nobody reads."""
        self.messages, self.sent, self.gone = [], asyncio.Event(), asyncio.Event()
        self.full = full

    @property
    def bodies(self):
        return [m["body"] for m in self.messages if m["type"] == "http.response.body"]

    async def run(self, server, body, path="/v1/completions"):
        content = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            if content:
                return content.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.messages.append(message)
            self.sent.set()
            if self.full:
                await asyncio.Event().wait()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "state": {},
        }
        app = create_app(server)
        try:
            await app(scope, receive, send)
        finally:
            app.state.workers.close()


def play(server, body):
    played = Played()
    asyncio.run(played.run(server, body))
    return played


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_job_is_cancelled_as_soon_as_its_client_is_gone(stream, begun):
    tickets = []

    def run_on(ticket):
        tickets.append(ticket)
        if begun:
            ticket.put(0, "so far", 2)

    async def run():
        server, played = scripted_server(run_on), Played()
        task = asyncio.create_task(played.run(server, {**TEXT, "stream": stream}))
        while not tickets:
            await asyncio.sleep(0)
        if stream:
            await asyncio.wait_for(played.sent.wait(), 10)
        played.gone.set()
        await asyncio.wait_for(task, 10)
        return server.scheduler.cancelled

    assert asyncio.run(run()) == tickets


def test_a_job_is_cancelled_though_its_stream_never_began():
    tickets = []

    async def run():
        server, played = scripted_server(tickets.append), Played(full=True)
        task = asyncio.create_task(played.run(server, {**TEXT, "stream": True}))
        await asyncio.wait_for(played.sent.wait(), 10)
        played.gone.set()
        await asyncio.wait_for(task, 10)
        return server.scheduler.cancelled

    assert asyncio.run(run()) == tickets


def test_a_job_that_has_ended_is_not_cancelled():
    server = scripted_server(says("Yes"))
    play(server, TEXT)
    play(server, {**TEXT, "stream": True})
    assert server.scheduler.cancelled == []


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_stops_when_a_client_hangs_up(server, stream):
    scheduler = server.server.scheduler
    before = scheduler.stats().cancelled
    body = {**TEXT, "max_tokens": 1_000_000, "logit_bias": no_end(server), "stream": stream}
    url = server.url + "/v1/completions"
    with httpx.Client(timeout=httpx.Timeout(10, read=0.3)) as client:
        if stream:
            with client.stream("POST", url, json=body) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url, json=body)
    until = time.monotonic() + 20
    while scheduler.stats().running and time.monotonic() < until:
        time.sleep(0.01)
    stats = scheduler.stats()
    assert (stats.running, stats.cancelled) == (0, before + 1)


def no_end(server):
    """A bias that no end token survives, so that an answer would go on for minutes."""
    ends = server.server.models[BOX].lm.config.end_token_ids
    return {str(end): -100 for end in ends}


def test_a_silent_stream_sends_comments(monkeypatch):
    monkeypatch.setattr(sse, "HEARTBEAT", 0.01)

    async def run():
        server, played = scripted_server(lambda ticket: None), Played()
        task = asyncio.create_task(played.run(server, {**TEXT, "stream": True}))
        while len(played.bodies) < 2:
            await asyncio.sleep(0.01)
        played.gone.set()
        await asyncio.wait_for(task, 10)
        return played.bodies

    bodies = asyncio.run(asyncio.wait_for(run(), 20))
    assert bodies[:2] == [b": waiting\n\n"] * 2
