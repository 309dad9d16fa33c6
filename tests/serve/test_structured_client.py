"""Structured output as OpenAI's client has it: pydantic models in, checked objects out."""

from __future__ import annotations

import json
from enum import Enum

import httpx
import jsonschema_rs
import openai
import pytest
from chat_models import RECURRENT, chat_model
from chat_templates import QWEN3
from pydantic import BaseModel, Field
from support.serving import running_server

from nomatmul.serve.models import served_model

USER = {"role": "user", "content": "A person, please"}


class Colour(Enum):
    RED = "red"
    GREEN = "gr\u00fcn"


class Child(BaseModel):
    name: str = Field(max_length=6)
    colour: Colour | None


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=120)
    height: float = Field(ge=0, le=3)
    children: list[Child] = Field(max_length=2)
    boss: Person | None


class Move(BaseModel):
    """Move a piece."""

    piece: Colour
    steps: int = Field(ge=-9, le=9)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    model = served_model("qwen", chat_model(directory, RECURRENT, QWEN3), directory)
    with running_server(models={"qwen": model}) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(6))
def test_a_pydantic_model_is_parsed_from_random_weights_at_temperature_two(client, seed):
    options = {"model": "qwen", "messages": [USER], "response_format": Person, "temperature": 2}
    try:
        answer = client.chat.completions.parse(**options, seed=seed, max_completion_tokens=300)
    except openai.LengthFinishReasonError:  # it was cut off, which the client says by an error
        return
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)


def test_some_of_them_end(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="qwen", messages=[USER], response_format=form, temperature=2, n=8, seed=1,
        max_completion_tokens=150,
    )  # fmt: skip
    whole = [c.message.content for c in answer.choices if c.finish_reason == "stop"]
    assert len(whole) > 3
    assert len(set(whole)) > 1
    for text in whole:
        jsonschema_rs.validate(schema, json.loads(text))


@pytest.mark.parametrize("seed", range(3))
def test_a_tool_of_a_pydantic_model_streams_what_it_answers_whole(client, seed):
    options = {
        "model": "qwen",
        "messages": [USER],
        "tools": [openai.pydantic_function_tool(Move)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 2,
        "seed": seed,
        "max_completion_tokens": 300,
    }
    whole = client.chat.completions.parse(**options).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Move)
    with client.chat.completions.stream(**options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert events.count("tool_calls.function.arguments.delta") >= 1
    assert events.count("tool_calls.function.arguments.done") == 1
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    assert final.message.tool_calls[0].id == call.id
    answer = client.chat.completions.create(
        model="qwen",
        messages=[
            USER,
            whole.message.model_dump(mode="json"),  # with all that the client has added
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ],
        tools=options["tools"],
        seed=seed,  # without one, random weights may end their turn at any token
        max_completion_tokens=3,
    )
    assert 1 <= answer.usage.completion_tokens <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_answer_is_told_so(running, stream):
    """Here a bias bans what the grammar wants; that shows when the token is chosen."""
    brace = running.server.models["qwen"].language.tokenizer.encode("{").ids[0]
    body = {
        "model": "qwen",
        "messages": [USER],
        "response_format": {"type": "json_object"},
        "logit_bias": {str(brace): -100},
        "max_completion_tokens": 9,
        "stream": stream,
    }
    answer = httpx.post(running.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == (200 if stream else 400)
    assert "bias and grammar leave none" in answer.text
    assert '"code":"unanswerable"' in answer.text.replace(": ", ":")


def test_refusals_name_the_place(running):
    schema = {"type": "object", "properties": {"x": {"pattern": "(?<!a)b"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": "qwen", "messages": [USER], "response_format": form}
    url = running.url + "/v1/chat/completions"
    error = httpx.post(url, json=body, timeout=60).json()["error"]
    assert error["param"] == "response_format"
    assert "#/properties/x: " in error["message"]
    schema["properties"]["x"] = {"not": {}}
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema.properties.x.not"
