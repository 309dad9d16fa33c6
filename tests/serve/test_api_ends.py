"""Answers that do not end by themselves, and what the cache says of itself in them."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
from support.scripted import ask, says, scripted_server
from support.serving import running_server

from nomatmul.serve import embeddings
from nomatmul.serve.options import ServeOptions

BOX = "nomatmul-box"
ENDLESS = {"model": BOX, "prompt": "The river", "max_tokens": 1_000_000}


def no_end(running):
    ends = running.server.models[BOX].lm.config.end_token_ids
    return {str(end): -100 for end in ends}


@pytest.fixture(scope="module")
def hasty():
    """A server whose requests may take a second."""
    with running_server(ServeOptions(threads=1, timeout=1.0)) as running:
        yield running


def test_an_answer_that_takes_too_long_is_an_error(hasty):
    body = {**ENDLESS, "logit_bias": no_end(hasty)}
    response = httpx.post(hasty.url + "/v1/completions", json=body, timeout=30)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    assert "1 s" in response.json()["error"]["message"]


def test_a_stream_that_takes_too_long_ends_with_an_error(hasty):
    with openai.OpenAI(base_url=hasty.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(**ENDLESS, logit_bias=no_end(hasty), stream=True)
        assert next(stream).choices[0].text
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "timeout"


def test_vectors_that_take_too_long_are_an_error(hasty, monkeypatch):
    """Slices that get nowhere stand for an input of hours."""
    monkeypatch.setattr(embeddings, "_slice", lambda work, pace: lambda: None)
    body = {"model": BOX, "input": "The river"}
    response = httpx.post(hasty.url + "/v1/embeddings", json=body, timeout=30)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"


def test_a_stream_is_cut_when_the_server_closes():
    with running_server() as running:
        url, body = running.url + "/v1/completions", {**ENDLESS, "logit_bias": no_end(running)}
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as response:
            pieces = response.iter_text()
            got = next(pieces)
            closing = threading.Thread(target=running.server.close, args=(0.0,))
            closing.start()
            got += "".join(pieces)
            closing.join()
    *_, last, done, rest = got.split("\n\n")
    name, data = last.split("\n")
    assert (name, done, rest) == ("event: error", "data: [DONE]", "")
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_usage_says_what_was_cached():
    with running_server() as running:
        url = running.url + "/v1/completions"
        body = {"model": BOX, "prompt": "The river runs to the sea", "max_tokens": 8, "seed": 1}
        first, second = (httpx.post(url, json=body).json() for _ in range(2))
        longer = {**body, "prompt": body["prompt"] + first["choices"][0]["text"] + " and then"}
        third = httpx.post(url, json=longer).json()
    assert first["choices"] == second["choices"]
    found = [
        answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)
    ]
    assert found == [0, first["usage"]["prompt_tokens"]]
    cached = third["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] <= cached < third["usage"]["prompt_tokens"]
    assert third["nomatmul"]["cached_tokens"] == cached
    assert third["nomatmul"]["computed_tokens"] == third["usage"]["prompt_tokens"] - cached


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_encoder_writes_no_text(path):
    models = {"encoder": SimpleNamespace(kind="encoder", name="encoder")}
    server = scripted_server(says("No"), models=models)
    body = {"model": "encoder"}
    body |= (
        {"prompt": "x"} if "chat" not in path else {"messages": [{"role": "user", "content": ""}]}
    )
    response = ask(server, "POST", path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert "/v1/embeddings" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"model": BOX, "prompt": "x", "max_tokens": 1}])
def test_every_response_has_an_id(server, body):
    responses = [httpx.post(server.url + "/v1/completions", json=body) for _ in range(2)]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 2
    assert all(one.startswith("req_") for one in ids)


def test_bodies_are_described():
    document = ask(scripted_server(says("x")), "GET", "/openapi.json").json()
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "UserMessage"} <= names
    for place in text.split('"$ref": "')[1:]:
        assert place.split('"')[0].removeprefix("#/components/schemas/") in names
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["required"] is True
