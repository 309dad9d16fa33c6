"""The next turn of a chat computes what is new, in whatever tokens the model wrote its answer."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_models import ATTENTION, chat_model
from chat_templates import CHATML
from support.serving import Running, running_server

from nomatmul.serve.cuts import TAIL
from nomatmul.serve.models import served_model
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.scheduler import Scheduler

BOX = "nomatmul-box"
QUESTIONS = ("The river runs through the old town", "and then the people", "It was the first time")
Futures = queue.Queue[Future[int]]


@pytest.fixture
def futures(monkeypatch: pytest.MonkeyPatch) -> Futures:
    """What was given to be read again."""
    found: Futures = queue.Queue()
    original = Scheduler.read_again

    def noted(*arguments: Any) -> Future[int]:
        future = original(*arguments)
        found.put(future)
        return future

    monkeypatch.setattr(Scheduler, "read_again", noted)
    return found


@pytest.fixture
def running(futures: Futures) -> Iterator[Running]:
    """A server of its own, since it counts."""
    with running_server() as found:
        yield found


def _ask(running: Running, stream: bool, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(message, usage) of one answer."""
    url = f"{running.url}/v1/chat/completions"
    if not stream:
        answer = httpx.post(url, json=body, timeout=60).raise_for_status().json()
        return answer["choices"][0]["message"], answer["usage"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    text = ""
    usage: dict[str, Any] = {}
    for line in httpx.post(url, json=body, timeout=60).raise_for_status().text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            usage = chunk["usage"] or usage
    return {"role": "assistant", "content": text}, usage


def _converse(
    running: Running, futures: Futures, name: str, stream: bool, **fields: Any
) -> list[int]:
    """Hold a conversation; return how many tokens of each answer were read again.

    A turn computes what it has beyond the conversation before it, and TAIL tokens at most that the
    text behind it changes or that no snapshot stands behind.
    """
    model, messages, before, read = running.server.models[name], [], (), []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        said, usage = _ask(running, stream, model=name, messages=messages, **fields)
        ids = model.chat_ids(messages).ids
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] == len(ids)
        assert cached >= len(before) - TAIL
        messages.append({"role": "assistant", "content": said["content"]})
        before = model.chat_ids(messages, add_generation_prompt=False).ids
        read.append(futures.get(timeout=60).result(60))
    assert futures.empty()
    stats = running.server.scheduler.stats()
    assert stats.reread_tokens == sum(read)
    assert stats.cached_tokens + stats.computed_tokens == stats.prompt_tokens
    assert (stats.submitted, stats.finished) == (len(QUESTIONS), len(QUESTIONS))
    return read


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("temperature", "seed"), [(0, 1), (1, 1), (1, 2)])
def test_a_turn_of_the_box_computes_what_is_new(
    running: Running, futures: Futures, stream: bool, temperature: float, seed: int
) -> None:
    fields = {"temperature": temperature, "seed": seed, "max_tokens": 150}
    read = _converse(running, futures, BOX, stream, **fields)
    if temperature:  # of an answer in the tokenizer's own tokens nothing is read again
        assert max(read) > 50
    text = httpx.get(f"{running.url}/metrics").text
    assert f"nomatmul_engine_reread_tokens_total {float(sum(read))}" in text


def test_answers_equal_those_of_a_server_without_cache(running: Running, futures: Futures) -> None:
    options = ServeOptions(threads=1, state_cache=0)
    messages: list[dict[str, Any]] = []
    with running_server(options) as cold:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            fields = {"model": BOX, "messages": messages, "seed": 1, "max_tokens": 100}
            said, _ = _ask(running, False, **fields)
            futures.get(timeout=60).result(60)
            assert said == _ask(cold, False, **fields)[0]
            messages.append({"role": "assistant", "content": said["content"]})
        assert futures.empty()  # without a cache nothing is read again
        assert cold.server.scheduler.stats().reread_tokens == 0


def test_every_choice_may_be_gone_on_from(running: Running, futures: Futures) -> None:
    question = {"role": "user", "content": QUESTIONS[0]}
    body = {"model": BOX, "messages": [question], "n": 3, "seed": 1, "max_tokens": 120}
    url = f"{running.url}/v1/chat/completions"
    choices = httpx.post(url, json=body, timeout=60).raise_for_status().json()["choices"]
    for _ in choices:
        futures.get(timeout=60).result(60)
    model = running.server.models[BOX]
    for choice in choices:
        before = [question, {"role": "assistant", "content": choice["message"]["content"]}]
        known = len(model.chat_ids(before).ids)
        messages = [*before, {"role": "user", "content": "more"}]
        _, usage = _ask(running, False, model=BOX, messages=messages, max_tokens=1)
        assert usage["prompt_tokens_details"]["cached_tokens"] >= known - TAIL
        futures.get(timeout=60).result(60)


def test_a_turn_of_attention_with_a_template(futures: Futures, tmp_path: Path) -> None:
    """Bytes that are no character come back as three."""
    lm = chat_model(tmp_path, ATTENTION, CHATML)
    models = {"tiny": served_model("tiny", lm, tmp_path)}
    with running_server(models=models) as running:
        fields = {"temperature": 1, "seed": 1, "max_tokens": 20}
        read = _converse(running, futures, "tiny", False, **fields)
    assert max(read) > 10
