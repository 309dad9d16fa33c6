"""/tokenize and /detokenize: the tokens that the other routes feed, and their texts."""

from __future__ import annotations

import httpx
import pytest
from chat_models import ATTENTION, BEGIN, END, START, chat_model
from chat_templates import CHATML
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.vocabularies import byte_fallback_model
from support.serving import running_server

from nomatmul.serve.limits import MAX_PROMPT
from nomatmul.serve.models import served_model

MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    first, second = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("fallback")
    models = {
        "tiny": served_model("tiny", chat_model(first, ATTENTION, CHATML), first),
        "fallback": served_model("fallback", byte_fallback_model(second), second),
    }
    with running_server(models=models) as running:
        yield running


@pytest.fixture(scope="module")
def post(running):
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield lambda route, **body: client.post(route, json=body)


def test_a_prompt_is_what_completions_feed(post, running):
    answer = post("/tokenize", model="tiny", prompt="ab", return_token_strs=True).json()
    lm = running.server.models["tiny"].lm
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": lm.prompt_ids("ab"),
        "token_strs": ["<|begin|>", "a", "b"],
    }
    used = post("/v1/completions", model="tiny", prompt="ab", max_tokens=1).json()["usage"]
    assert used["prompt_tokens"] == answer["count"]


def test_special_tokens_can_be_left_out(post):
    answer = post("/tokenize", model="tiny", prompt="ab", add_special_tokens=False).json()
    assert answer["tokens"] == post("/tokenize", model="tiny", prompt="ab").json()["tokens"][1:]
    assert answer["token_strs"] is None
    empty = post("/tokenize", model="tiny", prompt="", add_special_tokens=False).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


def test_messages_go_through_the_template(post):
    answer = post("/tokenize", model="tiny", messages=MESSAGES).json()
    tokens = answer["tokens"]
    assert tokens.count(START) == 2
    assert tokens.count(END) == 1  # the one that the user typed is text
    used = post("/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=1).json()
    assert used["usage"]["prompt_tokens"] == answer["count"]
    without = post("/tokenize", model="tiny", messages=MESSAGES, add_generation_prompt=False).json()
    assert tokens[: without["count"]] == without["tokens"]
    assert without["count"] < len(tokens)


def test_tools_count(post):
    tools = [{"type": "function", "function": {"name": "now", "description": "the time"}}]
    with_tools = post("/tokenize", model="tiny", messages=MESSAGES, tools=tools).json()["count"]
    assert with_tools > post("/tokenize", model="tiny", messages=MESSAGES).json()["count"] + 50


def test_special_tokens_are_spelt(post):
    answer = post("/detokenize", model="tiny", tokens=[BEGIN, 65, 66, END])
    assert answer.json()["prompt"].startswith("<|begin|>")
    assert post("/detokenize", model="tiny", tokens=[]).json() == {"prompt": ""}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@pytest.mark.parametrize("model", ["tiny", "fallback"])
def test_texts_come_back(post, model, text):
    tokens = post("/tokenize", model=model, prompt=text, add_special_tokens=False).json()["tokens"]
    assert post("/detokenize", model=model, tokens=tokens).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("/tokenize", {"prompt": "a" * (MAX_PROMPT + 1)}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1] * (MAX_PROMPT + 1)}, "tokens"),
        ("/detokenize", {"tokens": [1, 270]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_faults_are_named(post, route, body, param):
    answer = post(route, model="tiny", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_one_of_several_models_must_be_named(post):
    answer = post("/tokenize", prompt="a")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert post("/tokenize", model="other", prompt="a").status_code == 404


def test_the_only_model_need_not_be_named(server):
    answer = httpx.post(server.url + "/tokenize", json={"prompt": "The river"}, timeout=60)
    assert answer.json()["count"] == 3
