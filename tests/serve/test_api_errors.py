"""What is refused, and how: status, parameter and code of OpenAI's form, before any work."""

from __future__ import annotations

import json

import pytest
from support.scripted import ask, says, scripted_server

from nomatmul.serve.job import Busy, Closing

BOX = "nomatmul-box"
USER = {"role": "user", "content": "Hello"}
CHAT = {"model": BOX, "messages": [USER]}
TEXT = {"model": BOX, "prompt": "Hello"}


@pytest.fixture(scope="module")
def server():
    return scripted_server(says("Yes"))


def refused(server, path, body, status=400):
    """The error that a body costs; nothing may have reached the scheduler."""
    before = len(server.scheduler.jobs)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = ask(server, "POST", path, content=content)
    assert response.status_code == status, response.text
    assert len(server.scheduler.jobs) == before
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert error["type"] == "invalid_request_error"
    return error


def message(**fields):
    return {"messages": [{**USER, **fields}]}


BOTH = [
    ({"n": "1"}, "n", "invalid_type"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"n": True}, "n", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"model": ""}, "model", "invalid_value"),
    ({"model": 5}, "model", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (
        {"stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown_parameter",
    ),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": False}, "temperature", "invalid_type"),
    ({"temperature": 10**400}, "temperature", None),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"seed": 1 << 63}, "seed", "invalid_value"),
    ({"seed": 10**4000}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1 << 40}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1 << 20, "n": 2}, "max_tokens", "too_many_tokens"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": "x" * 1025}, "stop", "invalid_value"),
    ({"logit_bias": {"Hello": 1}}, "logit_bias.Hello", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
    ({"logit_bias": {"1": "1"}}, "logit_bias.1", "invalid_type"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "invalid_value"),
    ({"surprise": 1}, "surprise", "unknown_parameter"),
    ({"user": "a\0b"}, "user", "invalid_value"),
]
CHATS = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": "Hello"}, "messages", "invalid_type"),
    ({"messages": ["Hello"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
    (message(role="robot"), "messages[0].role", "invalid_value"),
    (message(role=5), "messages[0].role", "invalid_value"),
    (message(role="function"), "messages[0].role", "invalid_value"),
    (message(content=5), "messages[0].content", "invalid_type"),
    (message(content=None), "messages[0].content", "invalid_type"),
    (message(content=[]), "messages[0].content", "invalid_value"),
    (
        message(content=[{"type": "text"}]),
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        message(content=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (message(surprise=1), "messages[0].surprise", "unknown_parameter"),
    (message(content="x" * ((1 << 20) + 1)), "messages", "invalid_value"),
    (message(role="tool"), "messages[0].tool_call_id", "missing_required_parameter"),
    (message(role="assistant", content=None), "messages[0].content", "invalid_value"),
    (
        message(role="assistant", function_call={"name": "f"}),
        "messages[0].function_call",
        "unsupported_parameter",
    ),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"web_search_options": {"x": 1}}, "web_search_options", "unsupported_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
]
TEXTS = [
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": ["a", ""]}, "prompt[1]", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [1, 1.0]}, "prompt[1]", "invalid_type"),
    ({"prompt": [True]}, "prompt[0]", "invalid_type"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_value"),
    ({"prompt": [10**9]}, "prompt", "invalid_value"),
    ({"prompt": [[1], [10**9]]}, "prompt[1]", "invalid_value"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
    ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
    ({"prompt": "x" * ((1 << 20) + 1)}, "prompt", "invalid_value"),
    ({"prompt": ["x" * (1 << 19)] * 3}, "prompt", "invalid_value"),
    ({"prompt": [1] * ((1 << 20) + 1)}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "too_many_choices"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "invalid_value"),
    ({"logprobs": 6}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"echo": 1}, "echo", "invalid_type"),
    ({"messages": [USER]}, "messages", "unknown_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "unknown_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BOTH + CHATS)
def test_a_bad_chat_request_names_its_parameter(server, fields, param, code):
    error = refused(server, "/v1/chat/completions", {**CHAT, **fields})
    assert (error["param"], error["code"]) == (param, code or error["code"])


@pytest.mark.parametrize(("fields", "param", "code"), BOTH + TEXTS)
def test_a_bad_text_request_names_its_parameter(server, fields, param, code):
    error = refused(server, "/v1/completions", {**TEXT, **fields})
    assert (error["param"], error["code"]) == (param, code or error["code"])


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_is_missing_is_named(server, name):
    body = {key: value for key, value in CHAT.items() if key != name}
    error = refused(server, "/v1/chat/completions", body)
    assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object, got []"),
        (b'"text"', "object"),
        (b"null", "object, got null"),
        (b"\xff{}", "JSON"),
        (b'{"model": "m", "model": "m"}', "'model' appears twice"),
        (b'{"metadata": {"a": 1, "a": 1}}', "'a' appears twice"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "1e999"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "JSON"),
        (b'{"a": ' * 100_000, "nested"),
        (b'{"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    ],
)
def test_what_is_no_json_is_refused(server, body, word):
    assert word in refused(server, "/v1/completions", body)["message"]


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff\ud800", r"ok \udc00"])
def test_half_characters_are_refused_wherever_they_stand(server, escape):
    for param in ("messages[0].content", "metadata.a[0]"):
        content, other = (escape, "x") if "content" in param else ("x", escape)
        body = (
            f'{{"model":"{BOX}","metadata":{{"a":["{other}"]}},'
            f'"messages":[{{"role":"user","content":"{content}"}}]}}'
        ).encode()
        assert refused(server, "/v1/chat/completions", body)["param"] == param


def test_a_whole_character_may_be_spelt_by_its_halves(server):
    body = rf'{{"model":"{BOX}","prompt":"\ud83d\ude00"}}'.encode()
    assert ask(server, "POST", "/v1/completions", content=body).status_code == 200


def test_a_key_with_a_half_character_is_refused(server):
    refused(server, "/v1/completions", rf'{{"model":"{BOX}","a\ud800":1}}'.encode())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found(server, path):
    body = {**(CHAT if "chat" in path else TEXT), "model": "gpt-4"}
    error = refused(server, path, body, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'gpt-4'" in error["message"]


def test_long_values_are_not_repeated(server):
    error = refused(server, "/v1/completions", {**TEXT, "model": "m" * 200}, 404)
    assert "m" * 100 not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "unknown_url"),
    ],
)
def test_wrong_addresses_are_answered_in_the_same_form(server, method, path, status, code):
    response = ask(server, method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert path in response.json()["error"]["message"]


def raising(error):
    def play(_):
        raise error

    return scripted_server(play)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(stream):
    response = ask(raising(Busy(2.2)), "POST", "/v1/completions", json={**TEXT, "stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_closing_server_says_so():
    response = ask(raising(Closing()), "POST", "/v1/completions", json=TEXT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"


def test_a_fault_of_ours_tells_nothing_of_the_inside():
    response = ask(raising(KeyError("secret")), "POST", "/v1/completions", json=TEXT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("finish", "status", "code"),
    [
        ("timeout", 504, "timeout"),
        ("shutdown", 503, "shutting_down"),
        ("error", 500, "internal_error"),
    ],
)
def test_an_answer_that_was_cut_off_is_an_error(finish, status, code):
    response = ask(
        scripted_server(says("Half", finish=finish)), "POST", "/v1/completions", json=TEXT
    )
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "Half" not in response.text
    assert (response.headers.get("x-should-retry") == "false") == (finish == "timeout")


@pytest.mark.parametrize("finish", ["timeout", "shutdown", "error"])
def test_a_stream_that_is_cut_off_ends_with_an_error_event(finish):
    server = scripted_server(says("Half", finish=finish))
    response = ask(server, "POST", "/v1/completions", json={**TEXT, "stream": True})
    assert response.status_code == 200
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    name, data = last.split("\n")
    assert name == "event: error"
    assert set(json.loads(data.removeprefix("data: "))["error"]) >= {"message", "code", "type"}


def test_what_the_engine_says_of_a_fault_reaches_the_client():
    def play(ticket):
        ticket.error = "not enough memory"
        ticket.put(0, finish="error")

    response = ask(scripted_server(play), "POST", "/v1/completions", json=TEXT)
    assert response.json()["error"]["message"] == "not enough memory"
