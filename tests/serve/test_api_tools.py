"""Tools and response formats through OpenAI's client: what is bound to a schema follows it."""

from __future__ import annotations

import json

import openai
import pytest

BOX = "nomatmul-box"
USER = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, messages=(USER,), **options):
    options = {"seed": 5, "max_completion_tokens": 400, "temperature": 0, **options}
    return client.chat.completions.create(model=BOX, messages=list(messages), **options)


def one_call(client):
    return chat(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)


def call_of(choice):
    (call,) = choice.message.tool_calls
    return call


def test_a_required_call_follows_its_schema(client):
    choice = one_call(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = call_of(choice)
    assert (call.type, call.function.name) == ("function", "weather")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9


def test_one_function_may_be_asked_for(client):
    choice = {"type": "function", "function": {"name": "clock"}}
    answer = chat(client, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert call_of(answer.choices[0]).function.name == "clock"


def test_no_call_is_made_where_none_is_allowed(client):
    answer = chat(client, tools=[WEATHER], tool_choice="none", max_completion_tokens=8)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"


def test_a_free_answer_is_text(client):
    answer = chat(client, tools=[WEATHER], max_completion_tokens=8)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_a_streamed_call_equals_the_whole_one(client):
    options = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "n": 2, "temperature": 1}
    options["max_completion_tokens"] = 100
    whole = chat(client, **options).choices
    found, reasons = {}, {}
    for chunk in chat(client, stream=True, **options):
        for choice in chunk.choices:
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            assert not choice.delta.content
            for news in choice.delta.tool_calls or ():
                call = found.setdefault((choice.index, news.index), ["", "", ""])
                call[0] += news.id or ""
                call[1] += news.function.name or ""
                call[2] += news.function.arguments or ""
    for choice in whole:
        assert reasons[choice.index] == choice.finish_reason
        for at, call in enumerate(choice.message.tool_calls):
            same = [call.id, call.function.name, call.function.arguments]
            assert found.pop((choice.index, at)) == same
    assert not found
    ids = [call.id for choice in whole for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)


def test_a_call_that_is_cut_short_ends_with_length(client):
    answer = chat(client, tools=[WEATHER], tool_choice="required", max_completion_tokens=12)
    assert answer.choices[0].finish_reason == "length"


def test_a_result_is_sent_back(client):
    first = one_call(client).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny."}
    answer = chat(client, [USER, first, result], tools=[WEATHER], max_completion_tokens=8)
    without = chat(client, [USER, first], tools=[WEATHER], max_completion_tokens=8)
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens
    assert answer.choices[0].message.role == "assistant"


def test_a_response_format_binds_the_answer(client):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    choice = chat(client, response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    answer = json.loads(choice.message.content)
    assert answer["city"] in ("Paris", "Rome")
    assert isinstance(answer["warm"], bool)
    streamed = chat(client, response_format=form, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(parts) == choice.message.content


def test_text_is_a_response_format_too(client):
    plain = chat(client, max_completion_tokens=8).choices[0].message.content
    form = {"type": "text"}
    answer = chat(client, max_completion_tokens=8, response_format=form)
    assert answer.choices[0].message.content == plain


def test_an_object_is_asked_for(client):
    choice = chat(
        client, response_format={"type": "json_object"}, max_completion_tokens=300, temperature=1
    ).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice.function.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strange"}},
                }
            },
            "response_format.json_schema.schema.type",
        ),
        (
            {"messages": [USER, {"role": "tool", "tool_call_id": "none", "content": "x"}]},
            "messages[1].tool_call_id",
        ),
    ],
)
def test_what_is_refused_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.param == param
