"""Clients of a soak: honest ones, whose answers are checked, and all kinds of others.

A client's behaviour is a coroutine that ends after one request or one piece of mischief. What the
server must never do is a line in `World.faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from serve_client import Address, Answer, Reply, ask, complete, fetch
from support.soak_known import CHAT, COMPLETIONS, Known

PATIENCE = 120.0  # seconds for an answer that a client waits for
HUGE = 10_000_000  # bytes of a prompt that nobody should send
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"model": "box"}',
    b'{"model": "box", "prompt": 5}',
    b'{"model": "box", "prompt": []}',
    b'{"model": "box", "prompt": [1e99]}',
    b'{"model": "box", "prompt": [-1]}',
    b'{"model": "box", "prompt": [99999999]}',
    b'{"model": "box", "prompt": "x", "max_tokens": -1}',
    b'{"model": "box", "prompt": "x", "max_tokens": "1"}',
    b'{"model": "box", "prompt": "x", "temperature": NaN}',
    b'{"model": "box", "prompt": "x", "n": 1000000}',
    b'{"model": "box", "prompt": "x", "surprise": 1}',
    b'{"model": "nobody", "prompt": "x"}',
    b'{"model": "box", "prompt": "\\ud800"}',
    b'{"model": "box", "messages": [{"role": "king", "content": "x"}]}',
    b'{"model": "box", "messages": "x"}',
    b"[" * 5000 + b"]" * 5000,
    b'{"model": "box", "prompt": "x", "logit_bias": {"' + b"9" * 400 + b'": 1}}',
)
RAW: tuple[bytes, ...] = (
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01",
    b"A" * 200_000,
)


@dataclass
class World:
    """What clients know and saw. seen: {(path, status): answers}; left: {path: requests whose
    client did not wait for a status}; usage: sums over answers that came whole."""

    address: Address
    known: list[Known]
    until: float
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    log: TextIO | None = None

    def say(self, text: str) -> None:
        """A line of the log."""
        if self.log is not None:
            self.log.write(text + "\n")
            self.log.flush()

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.say(f"FAULT {text}")

    def saw(self, path: str, status: int, *allowed: int) -> None:
        self.seen[path, status] += 1
        if status not in allowed:
            self.fault(f"{path}: status {status}, not one of {allowed}")


Behaviour = Callable[[World, random.Random], Awaitable[None]]


async def honest(world: World, choose: random.Random, streamed: bool = False) -> None:
    """An answer is, to the byte and the bit, what the model says when it is alone."""
    known = choose.choice(world.known)
    body = dict(known.body)
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = await _patient(world, known.path, body, choose)
    if answer is None:
        return
    got = (answer.text, tuple(answer.logprobs), answer.finish)
    if got != (known.text, known.logprobs, known.finish):
        world.fault(f"another answer to {known.body}: {got}, not {known}")


async def streaming(world: World, choose: random.Random) -> None:
    await honest(world, choose, streamed=True)


async def _patient(
    world: World, path: str, body: dict[str, Any], choose: random.Random
) -> Answer | None:
    """A whole answer; a client that is told to come back does. None where time is over."""
    while True:
        answer = await asyncio.wait_for(complete(world.address, path, body), PATIENCE)
        if answer.status != 429:
            break
        world.saw(path, 429, 429)
        if time.monotonic() > world.until:
            return None
        await asyncio.sleep(choose.uniform(0.1, 0.5))
    if answer.status:
        world.saw(path, answer.status, 200)
    if answer.error is not None:
        world.fault(f"{path}: {answer.error}")
        return None
    world.usage.update(
        {name: answer.usage[name] for name in ("prompt_tokens", "completion_tokens")}
    )
    return answer


async def leaver(world: World, choose: random.Random) -> None:
    """Goes away: before the answer begins, or in the middle of it."""
    body = {**choose.choice(world.known).body, "max_tokens": 400, "stream": True}
    path = CHAT if "messages" in body else COMPLETIONS
    reply = await _opened(world, path, json.dumps(body).encode(), choose.uniform(0.0, 0.5))
    if reply is None:
        return
    with contextlib.closing(reply):
        world.saw(path, reply.status, 200, 429)
        if reply.status == 200:
            wanted = choose.randrange(6)
            async for _ in reply.events():
                wanted -= 1
                if wanted < 0:
                    break


async def _opened(world: World, path: str, body: bytes, patience: float) -> Reply | None:
    """A reply whose status is there in time; else the client has left."""
    try:
        return await asyncio.wait_for(ask(world.address, path, body), patience)
    except (asyncio.TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        world.left[path] += 1
        return None


async def careless(world: World, choose: random.Random) -> None:
    """Sends a body that no one could answer; gets a status that says so, in OpenAI's form."""
    body = choose.choice(BAD_BODIES)
    path = CHAT if b"messages" in body else COMPLETIONS
    reply = await ask(world.address, path, body, method="POST")
    with contextlib.closing(reply):
        data = await reply.body()
    world.saw(path, reply.status, 400, 404, 413, 415, 422)
    if not isinstance(json.loads(data)["error"]["message"], str):
        world.fault(f"{body[:80]!r}: no message in {data[:200]!r}")


async def noise(world: World, choose: random.Random) -> None:
    """Sends bytes that are no request, or a part of one, and goes away."""
    world.left["other"] += 1
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection(*world.address)
        try:
            writer.write(choose.choice(RAW))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1 << 16), 0.3)
        finally:
            writer.close()


async def huge(world: World, choose: random.Random) -> None:
    """A prompt of ten megabytes: refused where the model's positions end, else the client leaves
    after a while."""
    name = choose.choice(sorted({one.body["model"] for one in world.known}))
    word = choose.choice(("word ", "a" * 60 + " ", "\u00e9\u00e8 "))
    prompt = word * (HUGE // len(word.encode()))
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 1}, ensure_ascii=False)
    reply = await _opened(world, COMPLETIONS, body.encode(), choose.uniform(0.5, 6.0))
    if reply is not None:
        with contextlib.closing(reply):
            world.saw(COMPLETIONS, reply.status, 200, 400, 413, 429)


async def slow(world: World, choose: random.Random) -> None:
    """Reads an answer drop by drop; others must not wait for it, and it gets all of it."""
    known = choose.choice(world.known)
    body = json.dumps({**known.body, "stream": True}).encode()
    reply = await asyncio.wait_for(ask(world.address, known.path, body, receive=2048), PATIENCE)
    with contextlib.closing(reply):
        world.saw(known.path, reply.status, 200, 429)
        if reply.status != 200:
            return
        text = ""
        async for data in reply.events():
            await asyncio.sleep(choose.uniform(0.0, 0.1))
            if data != b"[DONE]":
                for choice in json.loads(data)["choices"]:
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    if text != known.text:
        world.fault(f"a slow reader of {known.body} got {text!r}, not {known.text!r}")


async def grammar(world: World, choose: random.Random) -> None:
    """An answer bound to a schema is one, unless its tokens ran out."""
    schema = {"name": "thing", "schema": SCHEMA, "strict": True}
    known = choose.choice(world.known)
    body = {
        "model": known.body["model"],
        "messages": [{"role": "user", "content": f"A thing, {choose.random()}"}],
        "max_tokens": 60,
        "temperature": 1.0,
        "seed": choose.randrange(1000),
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    answer = await _patient(world, CHAT, body, choose)
    if answer is not None and answer.finish == "stop":
        value = json.loads(answer.text)
        if value["name"] not in ("a", "b") or not isinstance(value["count"], int):
            world.fault(f"{answer.text!r} does not follow the schema")


async def tools(world: World, choose: random.Random) -> None:
    """A call that is asked for comes, whole where its tokens did not run out."""
    known = choose.choice(world.known)
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    body = {
        "model": known.body["model"],
        "messages": [{"role": "user", "content": f"Call it, {choose.random()}"}],
        "max_tokens": 80,
        "temperature": 1.0,
        "seed": choose.randrange(1000),
        "tools": [tool],
        "tool_choice": "required",
    }
    status, found = await asyncio.wait_for(fetch(world.address, CHAT, body), PATIENCE)
    world.saw(CHAT, status, 200, 429)
    if status == 200:
        world.usage.update({n: found["usage"][n] for n in ("prompt_tokens", "completion_tokens")})
        choice = found["choices"][0]
        if choice["finish_reason"] == "tool_calls":
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def looker(world: World, choose: random.Random) -> None:
    """Asks what the server says of itself, and for vectors and tokens."""
    path = choose.choice(("/health", "/ready", "/metrics", "/v1/models"))
    status, _ = await asyncio.wait_for(fetch(world.address, path), PATIENCE)
    world.saw(path, status, 200)
    name = choose.choice(world.known).body["model"]
    body = {"model": name, "prompt": f"How many {choose.random()}?"}
    status, found = await asyncio.wait_for(fetch(world.address, "/tokenize", body), PATIENCE)
    world.saw("/tokenize", status, 200)
    if status == 200 and found["count"] != len(found["tokens"]):
        world.fault(f"/tokenize counts {found['count']} of {found['tokens']}")
    body = {"model": name, "input": f"A vector of {choose.random()}"}
    status, found = await asyncio.wait_for(fetch(world.address, "/v1/embeddings", body), PATIENCE)
    world.saw("/v1/embeddings", status, 200, 400, 429)


# How often each behaviour comes, of their sum.
BEHAVIOURS: dict[Behaviour, int] = {
    honest: 30,
    streaming: 30,
    leaver: 14,
    careless: 10,
    noise: 3,
    huge: 1,
    slow: 4,
    grammar: 4,
    tools: 2,
    looker: 4,
}


async def client(world: World, seed: int) -> None:
    """One client, until the time is over."""
    choose = random.Random(seed)
    kinds, weights = list(BEHAVIOURS), list(BEHAVIOURS.values())
    while time.monotonic() < world.until:
        (behaviour,) = choose.choices(kinds, weights)
        try:
            await behaviour(world, choose)
        except Exception as error:  # of a client that was not served as it should be
            world.fault(f"{behaviour.__name__}: {type(error).__name__}: {error}")
        world.done[behaviour.__name__] += 1
