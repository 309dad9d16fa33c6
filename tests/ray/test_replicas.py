"""Two replicas on one machine: conversations stay, and go on elsewhere when a replica is killed.

`make test-ray`; needs the extra serve-ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serve_client import Address, complete, fetch
from serve_sides import Served, free_port
from support.soak_known import CHAT, COMPLETIONS, cold

from nomatmul.serve.models import model_paths, open_models

MODEL = "nomatmul-box"
ASKED = {"model": MODEL, "temperature": 0, "max_tokens": 12}
MARK = "NOMATMUL_TEST_MARK"  # in the environment of the server and of all that Ray starts for it
PATIENCE = 90.0


@pytest.fixture(scope="module")
def server():
    mark = secrets.token_hex(8)
    port = free_port()
    command = [sys.executable, "-m", "nomatmul", "serve", "--replicas", "2", "--threads", "1"]
    command += ["--port", str(port), "--grace", "1"]
    served = Served("two replicas", command, port, {MARK: mark}, ready="/ready")
    served.mark = mark
    yield served
    assert served.close() == 0, served.said()


@pytest.fixture(scope="module")
def alone():
    """The model without a server."""
    return open_models(model_paths([]), threads=1)[MODEL]


def process_of(served: Served, number: int) -> int:
    """The process of a replica."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                title, mine = f"nomatmul:replica-{number}", f"{MARK}={served.mark}"
                if title.encode() not in (folder / "cmdline").read_bytes():
                    continue
                if mine.encode() in (folder / "environ").read_bytes():
                    return int(folder.name)
    raise AssertionError(f"replica {number} has no process")


async def requests_by_replica(address: Address) -> Counter[int]:
    """Answers of /v1 so far, by the replica that gave them."""
    _, text = await fetch(address, "/metrics")
    found = Counter[int]()
    for line in text.splitlines():
        if line.startswith("nomatmul_requests_total") and 'route="/v1' in line:
            found[int(re.search(r'replica="(\d+)"', line)[1])] += int(float(line.split()[-1]))
    return found


async def replica_of(address: Address, path: str, body: dict) -> tuple[int, object]:
    """(the replica that answered, the answer)."""
    before = await requests_by_replica(address)
    answer = await complete(address, path, body)
    assert answer.error is None, answer.error
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        more = await requests_by_replica(address) - before
        if more:
            (replica,) = more
            return replica, answer
        await asyncio.sleep(0.05)
    raise AssertionError("no replica counted the answer")


def messages(*said: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]


def test_it_is_one_server_to_its_clients(server):
    async def run():
        status, models = await fetch(server.address, "/v1/models")
        assert (status, [model["id"] for model in models["data"]]) == (200, [MODEL])
        status, text = await fetch(server.address, "/metrics")
        assert {'replica="0"', 'replica="1"'} <= set(re.findall(r'replica="\d"', text))
        status, found = await fetch(server.address, COMPLETIONS, {**ASKED, "prompt": 5})
        assert (status, found["error"]["param"]) == (400, "prompt")
        status, found = await fetch(server.address, "/v1/nothing")
        assert (status, found["error"]["code"]) == (404, "unknown_url")

    asyncio.run(run())


def test_a_conversation_stays_where_it_began_and_others_are_spread(server, alone):
    async def run():
        homes = {}
        for name in ("Anna", "Bert"):
            opening = f"{name} went down to the harbour in the morning. " * 8
            body = {**ASKED, "messages": messages(opening)}
            homes[name], answer = await replica_of(server.address, CHAT, body)
            said = [opening, answer.text]
            for turn in range(3):
                said.append(f"And then, for the {turn + 2}nd time?")
                body = {**ASKED, "messages": messages(*said), "logprobs": True}
                home, answer = await replica_of(server.address, CHAT, body)
                assert home == homes[name]
                assert answer.usage["prompt_tokens_details"]["cached_tokens"] > 50 * (turn + 1) // 2
                ids = alone.chat_ids(body["messages"]).ids
                known = cold(alone, ids, {**body, "seed": 0}, alone.end_tokens)
                assert (answer.text, tuple(answer.logprobs)) == known[:2]
                said.append(answer.text)
            # the other conversation begins while this one's replica has work
            if name == "Anna":
                long = {**ASKED, "messages": messages(*said, "Go on."), "max_tokens": 4000}
                running = asyncio.ensure_future(complete(server.address, CHAT, long))
                await asyncio.sleep(0)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert set(homes.values()) == {0, 1}

    asyncio.run(run())


def test_a_lost_replica_takes_no_others_stream_and_its_conversations_go_on(server, alone):
    async def run():
        said = ["The keeper of the lighthouse had a dog. " * 8]
        body = {**ASKED, "messages": messages(*said)}
        home, answer = await replica_of(server.address, CHAT, body)
        said += [answer.text, "And a cat."]

        long = {**ASKED, "messages": messages(*said), "max_tokens": 6000, "stream": True}
        dying = asyncio.ensure_future(complete(server.address, CHAT, long))
        await asyncio.sleep(0.2)  # the router has seen it: the next one begins elsewhere
        prompt = "Far away from there, another story began."
        other = {**ASKED, "prompt": prompt, "max_tokens": 1500, "stream": True, "seed": 0}
        going = asyncio.ensure_future(complete(server.address, COMPLETIONS, other))
        await asyncio.sleep(0.3)
        assert not dying.done()
        assert not going.done()
        os.kill(process_of(server, home), signal.SIGKILL)

        broken = await asyncio.wait_for(dying, PATIENCE)
        assert broken.error is not None
        assert json.loads(broken.error)["code"] == "replica_lost"
        whole = await asyncio.wait_for(going, PATIENCE)
        assert whole.error is None
        assert whole.text == cold(alone, alone.prompt_ids(prompt), other, ())[0]

        for _ in range(2):  # elsewhere, or where Ray has started another
            body = {**ASKED, "messages": messages(*said), "logprobs": True}
            answer = await asyncio.wait_for(complete(server.address, CHAT, body), PATIENCE)
            assert answer.error is None
            ids = alone.chat_ids(body["messages"]).ids
            known = cold(alone, ids, {**body, "seed": 0}, alone.end_tokens)
            assert (answer.text, tuple(answer.logprobs)) == known[:2]
            cached = answer.usage["prompt_tokens_details"]["cached_tokens"]
            said += [answer.text, "And then?"]
        assert cached > 50
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            _, text = await fetch(server.address, "/metrics")
            if len(set(re.findall(r'replica="\d"', text))) == 2:
                return
            await asyncio.sleep(0.2)
        raise AssertionError("Ray did not start another replica")

    asyncio.run(run())
