"""/v1/embeddings: the engine's vectors, in both encodings, in slices that hold up nobody."""

from __future__ import annotations

import base64
import json
import threading

import httpx
import numpy as np
import openai
import pytest
from chat_models import ATTENTION, chat_model
from chat_templates import CHATML
from encoder_files import DIALS, encoder_config, write_encoder, write_word_piece
from support.serving import running_server

import nomatmul
from nomatmul.convert import pack
from nomatmul.engine.embeddings import Reading
from nomatmul.serve.models import served_model

TEXTS = ["the old river", "the sea", "a quiet green town of stone"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    source = tmp_path_factory.mktemp("encoder")
    write_encoder(source, encoder_config(**DIALS["bert"]))
    write_word_piece(source)
    directory = source / "packed"
    pack(source, directory)
    encoder = served_model("encoder", nomatmul.load(directory, threads=1), directory)
    chat = tmp_path_factory.mktemp("tiny")
    tiny = served_model("tiny", chat_model(chat, ATTENTION, CHATML), chat)
    return {"encoder": encoder, "tiny": tiny}


@pytest.fixture(scope="module")
def running(models):
    with running_server(models=models) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def vectors_of(answer):
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return np.array([entry.embedding for entry in answer.data], np.float32)


def expected(models, name, texts):
    lm = models[name].lm
    return lm.embed(texts, normalize=True) if name == "encoder" else lm.embed(texts)


@pytest.mark.parametrize("name", ["encoder", "tiny"])
def test_vectors_are_the_engines_bit_for_bit(client, models, name):
    answer = client.embeddings.create(model=name, input=TEXTS)  # base64 is the client's default
    found = vectors_of(answer)
    assert np.array_equal(found, expected(models, name, TEXTS))
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert answer.model == name
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)


@pytest.mark.parametrize("name", ["encoder", "tiny"])
def test_both_encodings_say_the_same(client, name):
    plain = client.embeddings.create(model=name, input=TEXTS[0], encoding_format="float")
    packed = client.embeddings.create(model=name, input=TEXTS[0], encoding_format="base64")
    raw = np.frombuffer(base64.b64decode(packed.data[0].embedding), "<f4")
    assert np.array_equal(vectors_of(plain)[0], raw)


@pytest.mark.parametrize("name", ["encoder", "tiny"])
def test_token_ids_are_taken_as_they_are(client, models, name):
    lm = models[name].lm
    read = lm.text_ids if name == "encoder" else lm.whole_ids
    ids = [read(text) for text in TEXTS]
    whole = vectors_of(client.embeddings.create(model=name, input=ids))
    assert np.array_equal(whole, expected(models, name, TEXTS))
    alone = vectors_of(client.embeddings.create(model=name, input=ids[0]))
    assert np.array_equal(alone, whole[:1])


def test_dimensions_may_only_be_all(client, models):
    size = models["tiny"].lm.config.hidden_size
    assert len(client.embeddings.create(model="tiny", input="a", dimensions=size).data) == 1
    with pytest.raises(openai.BadRequestError) as found:
        client.embeddings.create(model="tiny", input="a", dimensions=size // 2)
    assert found.value.param == "dimensions"


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("tiny", {"input": ""}, "input"),
        ("tiny", {"input": []}, "input"),
        ("tiny", {"input": ["a", ""]}, "input[1]"),
        ("tiny", {"input": [[1], [999]]}, "input[1]"),
        ("encoder", {"input": [[1], [999]]}, "input[1]"),
        ("tiny", {"input": ["a", "b" * 600]}, "input[1]"),
        ("encoder", {"input": ["the", "the " * 30]}, "input[1]"),
        ("tiny", {"input": ["a"] * 2049}, "input"),
        ("tiny", {"input": [[1] * 500] * 601}, "input"),
        ("tiny", {"input": ["a" * 1000] * 1100}, "input"),
        ("tiny", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("tiny", {"input": "a", "truncate": True}, "truncate"),
        ("none", {"input": "a"}, "model"),
    ],
)
def test_faults_are_named(running, name, body, param):
    answer = httpx.post(running.url + "/v1/embeddings", json={"model": name, **body}, timeout=60)
    assert answer.status_code == (404 if name == "none" else 400)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("tokens", [1, 7, 64, 10_000])
def test_slices_change_no_bit(models, tokens):
    lm = models["tiny"].lm
    ids = [lm.checked_ids(list(range(3, 3 + count))) for count in (90, 1, 40, 40, 150)] * 5
    reading, steps = Reading(lm.backend, ids), 0
    while reading.left:
        before = reading.left
        read = reading.advance(tokens)
        assert 1 <= read <= tokens
        assert reading.left == before - read
        steps += 1
    assert np.array_equal(reading.vectors(), lm.embed(ids))
    assert steps >= sum(map(len, ids)) / tokens


def test_streams_go_on_beside_a_long_request(running):
    """Every gap between two events of the stream is far shorter than the request for vectors."""
    body = {"model": "tiny", "input": [[number % 200] * 400 for number in range(700)]}
    begun, done = threading.Event(), threading.Event()

    def embed():
        begun.wait(60)
        answer = httpx.post(running.url + "/v1/embeddings", json=body, timeout=120)
        done.set()
        statuses.append(answer.status_code)

    statuses, during = [], 0
    thread = threading.Thread(target=embed)
    thread.start()
    ask = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 500,
        "stream": True,
        "logit_bias": {"259": -100},
    }
    try:
        while not done.is_set():
            url = running.url + "/v1/completions"
            with httpx.stream("POST", url, json=ask, timeout=120) as stream:
                for line in stream.iter_lines():
                    begun.set()
                    if line.startswith("data: {"):
                        assert "error" not in json.loads(line[6:])
                        during += not done.is_set()
    finally:
        begun.set()
        thread.join(120)
    assert statuses == [200]
    assert during > 10
