"""No request makes the server fail: the answer is never a 5xx, and errors have OpenAI's form.

Bodies come from the schemas of /openapi.json, and from sound bodies in which something was changed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.serving import WAIT, Running, running_server

from nomatmul.serve.app import create_app
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.server import Server

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
JSON = {"Content-Type": "application/json"}
SCHEMA = schemathesis.openapi.from_dict(create_app(Server(ServeOptions())).openapi())
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
SOUND: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "model": "nomatmul-box",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "The river"}]},
                {"role": "assistant", "content": "runs"},
                {"role": "user", "content": "on"},
            ],
            "max_completion_tokens": 2,
            "temperature": 1.0,
            "top_p": 0.9,
            "seed": 1,
            "stop": ["x"],
            "logit_bias": {"5": 1.0},
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {
            "model": "nomatmul-box",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "tools": [TOOL],
            "tool_choice": "auto",
        },
        {
            "model": "nomatmul-box",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}},
            },
        },
    ],
    "/v1/completions": [
        {
            "model": "nomatmul-box",
            "prompt": ["The river", "A"],
            "max_tokens": 2,
            "echo": True,
            "logprobs": 1,
            "n": 1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "seed": 3,
        },
        {"model": "nomatmul-box", "prompt": [[1, 2], [3]], "max_tokens": 1, "stream": True},
    ],
    "/v1/embeddings": [{"model": "nomatmul-box", "input": ["a", "b"], "encoding_format": "float"}],
    "/tokenize": [{"model": "nomatmul-box", "prompt": "The river"}],
    "/detokenize": [{"model": "nomatmul-box", "tokens": [1, 2, 3]}],
}


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Running, httpx.Client]]:
    with running_server(ServeOptions(threads=1, timeout=WAIT)) as running:
        with httpx.Client(base_url=running.url, timeout=WAIT) as client:
            yield running, client
        assert running.server.scheduler.stats().failed == 0


def check(response: httpx.Response) -> None:
    """No 5xx, and errors in OpenAI's form."""
    sent = response.request.content[:500]
    assert response.status_code < 500, (sent, response.text)
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/json", sent
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent
        assert error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 2000, error["message"][:300]
        assert "Traceback" not in error["message"]
    elif "text/event-stream" in response.headers.get("content-type", ""):
        assert response.text.rstrip().endswith("data: [DONE]"), (sent, response.text[-300:])


def modest(body: Any) -> Any:
    """The same body, made to ask for few tokens; what is no sound number stays."""
    if isinstance(body, dict):
        body = dict(body)
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 3:
                body[name] = 3
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 1
        if isinstance(body.get("n"), int) and body["n"] > 3:
            body["n"] = 3
    return body


@SCHEMA.parametrize()
@FEW
def test_bodies_of_the_schema(case, fuzzed):
    running, _ = fuzzed
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "nomatmul-box"
    case.body = modest(case.body) if case.method == "POST" else case.body
    response = case.call(base_url=running.url, timeout=WAIT)
    check(_as_httpx(response))


def _as_httpx(response: Any) -> httpx.Response:
    request = httpx.Request(response.request.method, response.request.url)
    return httpx.Response(
        response.status_code,
        headers={k: v[0] for k, v in response.headers.items()},
        content=response.content,
        request=request,
    )


WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**64), 10**400, 1e308, -0.0, 0.5, 1e-320]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["", "\0", "\ufdd0", "<|endoftext|>", "A" * 5000, "\U0010ffff", "'\"\\"]),
    st.lists(st.one_of(st.none(), st.integers(-1, 9000), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.integers()), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items if isinstance(value, dict | list) else ():
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))
        else:
            yield (*path, key)


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, bytes]:
    """(path, body): a sound body with up to three values replaced, removed or added."""
    path = draw(st.sampled_from(sorted(SOUND)))
    body = copy.deepcopy(draw(st.sampled_from(SOUND[path])))
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(body))
        if not spots:
            break
        *way, last = draw(st.sampled_from(spots))
        holder: Any = body
        for key in way:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "remove":
            del holder[last]
        elif what == "replace" or isinstance(holder, list):
            holder[last] = draw(WEIRD)
        else:
            holder[draw(st.text(max_size=6))] = draw(WEIRD)
    text = json.dumps(modest(body))
    if draw(st.integers(0, 9)) == 0:  # what JSON's grammar or UTF-8 does not allow
        rotten = [b"\xff", b"NaN", b"\\ud800", b"}", b'"', b"1e999", b"\x00", b",,", b"9" * 5000]
        data = text.encode()
        at = draw(st.integers(0, len(data)))
        return path, data[:at] + draw(st.sampled_from(rotten)) + data[at:]
    return path, text.encode()


@given(changed())
@settings(FEW, max_examples=250)
def test_sound_bodies_with_something_changed(fuzzed, sent):
    path, content = sent
    check(fuzzed[1].post(path, content=content, headers=JSON))


@pytest.mark.parametrize("path", sorted(SOUND))
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"[]", b'"a"', b"1", b"{", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00"),
        *(b'{"model": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": NaN}', b'{"a": -Infinity}'),
        *(b"[" * 200, b'{"a":' * 63 + b"1" + b"}" * 63, b'{"a": ' + b"9" * 10_000 + b"}"),
        *(b'{"model": "a", "model": "b"}', b'{"model": 1}', b'{"a": 1e400}', b"{} {}"),
    ],
)
def test_what_is_no_request(fuzzed, path, content):
    response = fuzzed[1].post(path, content=content, headers=JSON)
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
@pytest.mark.parametrize("path", [*sorted(SOUND), "/v1/models", "/nothing", "/%2e%2e/%00", "//"])
def test_other_methods(fuzzed, method, path):
    response = fuzzed[1].request(method, path, headers=JSON)
    if method == "HEAD":
        assert response.status_code < 500
    else:
        check(response)
