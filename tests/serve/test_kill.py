"""A server that is killed in the middle of its work starts again with what it had saved."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serve_client import ask, complete
from serve_sides import ours
from support.soak_known import COMPLETIONS, cold

from nomatmul.serve.models import model_paths, open_models

HISTORY = ("The lighthouse stood on the rock. " * 30).strip()
BODY = {"model": "nomatmul-box", "temperature": 0.7, "seed": 5, "max_tokens": 12}
PATIENCE = 60.0


@pytest.fixture
def start(tmp_path):
    """Start servers on one directory of states; all of them end with the test."""
    servers = []

    def start():
        servers.append(ours("a server", [], 1, "--state-dir", str(tmp_path / "states")))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


async def _saved(directory: Path) -> None:
    """Wait until a state is on disk."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if any(directory.rglob("*.state")):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no state was written")


def test_a_killed_server_starts_again_and_has_what_it_had_saved(start, tmp_path):
    first = start()

    async def work() -> None:
        answer = await complete(first.address, COMPLETIONS, {**BODY, "prompt": HISTORY})
        assert answer.error is None
        await _saved(tmp_path)
        body = json.dumps({**BODY, "prompt": "A", "max_tokens": 5000, "stream": True}).encode()
        reply = await ask(first.address, COMPLETIONS, body)
        events = reply.events()
        for _ in range(3):
            await anext(events)
        first.kill()  # in the middle of a stream
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            async for _ in events:
                pass
        reply.close()

    asyncio.run(work())
    second = start()
    prompt = HISTORY + " In the night"
    body = {**BODY, "prompt": prompt, "logprobs": 0}
    answer = asyncio.run(complete(second.address, COMPLETIONS, body))
    assert answer.error is None
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] > 100
    served = open_models(model_paths([]), threads=1)["nomatmul-box"]
    text, logprobs, _ = cold(served, served.prompt_ids(prompt), body, ())
    assert (answer.text, tuple(answer.logprobs)) == (text, logprobs)
    assert second.close() == 0
