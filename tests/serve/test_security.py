"""Who may ask, under which name, with how large a body; and what every response carries."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket

import httpx
import pytest
from support.serving import running_server

from nomatmul.serve.bodies import Bodies, Depth
from nomatmul.serve.errors import ApiError
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.security import Keys

KEYS = ("first-key-aaaa", "second-key-bbb")
JSON = {"Content-Type": "application/json"}
BODY = {"model": "nomatmul-box", "prompt": "The river", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded():
    options = ServeOptions(threads=1, api_keys=KEYS, max_body=4096, cors=("https://a.example",))
    with running_server(options) as running, httpx.Client(base_url=running.url) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error of a response, in OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded, key):
    response = guarded.post("/v1/completions", json=BODY, headers=bearer(key))
    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        *({}, bearer("first-key-aaab"), bearer("x"), bearer("first-key-aaaa second-key-bbb")),
        *(bearer("FIRST-KEY-AAAA"), {"Authorization": "Basic first-key-aaaa"}),
        *({"Authorization": "first-key-aaaa"}, {"X-Api-Key": "first-key-aaaa"}),
    ],
)
def test_without_a_key_nothing_is_told(guarded, headers):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        response = guarded.get(path, headers=headers)
        assert response.status_code == 401, path
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.post("/v1/completions", json=BODY, headers=headers).status_code == 401


def test_probes_need_no_key(guarded):
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/ready").status_code == 200


def test_all_keys_are_compared(monkeypatch):
    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (seen.append(b), compare(a, b))[1])
    keys = Keys(KEYS)
    assert keys.find(b"first-key-aaaa") == 0
    assert len(seen) == len(KEYS)
    assert keys.find(b"other") is None
    assert len(seen) == 2 * len(KEYS)
    assert len({len(digest) for digest in seen}) == 1


def test_keys_do_not_show_in_the_options():
    assert "first-key" not in repr(ServeOptions(api_keys=KEYS))


def test_a_page_of_an_allowed_origin_may_ask(guarded):
    origin = {"Origin": "https://a.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    preflight = guarded.options("/v1/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    response = guarded.post("/v1/completions", json=BODY, headers={**bearer(KEYS[0]), **origin})
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    refused = guarded.get("/health", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_without_cors_no_page_may(server):
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/completions", headers=asked).status_code == 405


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_of_another_page_is_refused(server, kind):
    """Such requests need no permission of the browser's, so they must do nothing."""
    body = b'{"model": "nomatmul-box", "prompt": "a"}'
    response = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"Content-Type": kind}
    )
    assert response.status_code == 415
    assert error_of(response)["code"] == "not_json"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_a_name_of_the_outside_is_refused(server, host):
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert response.status_code == 421
    assert error_of(response)["code"] == "unknown_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8080", "a.localhost", "192.0.2.7"]
)
def test_names_of_this_machine_are_known(server, host):
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert response.status_code == 200


def test_a_name_may_be_allowed():
    with running_server(ServeOptions(threads=1, allow_host=("Chat.example",))) as running:
        for host, status in (("chat.example", 200), ("chat.example:443", 200), ("example", 421)):
            response = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
            assert response.status_code == status


def chunks(size: int):
    """A body whose length nobody declared."""
    for _ in range(size // 1024):
        yield b" " * 1024


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused(guarded, declared):
    content = b" " * 8192 if declared else chunks(8192)
    headers = {**JSON, **bearer(KEYS[0])}
    response = guarded.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert "4096" in response.json()["error"]["message"]


def test_a_body_of_the_limit_is_read(guarded):
    body = b'{"model": "nomatmul-box", "prompt": "a", "max_tokens": 1}'
    for content in (body.ljust(4096), (bytes([byte]) for byte in body)):
        headers = {**JSON, **bearer(KEYS[0])}
        response = guarded.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 200, response.text


def test_deep_json_is_refused(server):
    body = b'{"model": "nomatmul-box", "prompt": ' + b"[" * 100_000
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["code"] == "nested_too_deep"


def deepest(text: str) -> int:
    """How deep JSON is nested, character by character."""
    depth = most = 0
    inside = escaped = False
    for letter in text:
        if inside:
            if escaped:
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter == '"':
                inside = False
        elif letter == '"':
            inside = True
        elif letter in "[{":
            depth += 1
            most = max(most, depth)
        elif letter in "]}":
            depth -= 1
    return most


def accepted(text: str, limit: int, cut: int) -> bool:
    depth = Depth(limit)
    data = text.encode()
    try:
        for start in range(0, len(data), cut):
            depth.feed(data[start : start + cut])
    except ApiError:
        return False
    return True


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        *("[[[]]]", '["[[[[[["]', r'["\"[[[[", [[]]]', r'["\\", [[[]]]]', r'["\\\"[[", []]'),
        *('{"a": {"b": [1, {"c": 2}]}}', r'["\\\\\\\\[", "]]]", [["\\"]]]', '"é[["', "[]" * 50),
    ],
)
def test_depth_is_that_of_a_plain_scan(text, cut):
    depth = deepest(text)
    assert accepted(text, depth, cut)
    assert depth == 0 or not accepted(text, depth - 1, cut)


def test_headers_against_misuse(server):
    for path in ("/health", "/v1/models", "/nothing"):
        headers = httpx.get(f"{server.url}{path}").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_a_body_that_breaks_off_is_refused_once(server, caplog):
    where = httpx.URL(server.url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((where.host, where.port), timeout=30) as connection:
        connection.sendall(head + b"zz\r\n")  # no length of a chunk
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert httpx.get(server.url + "/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_large_bodies_on_their_way_are_bounded():
    """Eight of the largest size together; the ninth is asked to come again."""
    limit, sent = 2048, []

    async def app(scope, receive, send):
        raise AssertionError("no body is whole")

    guard = Bodies(app, limit)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}

    async def run() -> None:
        stuck = asyncio.Event()

        async def upload(size: int) -> None:
            pieces = [{"type": "http.request", "body": b" " * size, "more_body": True}]

            async def receive():
                if not pieces:
                    await stuck.wait()
                    return {"type": "http.disconnect"}
                return pieces.pop()

            async def send(message):
                sent.append(message)

            await guard(scope, receive, send)

        waiting = [asyncio.create_task(upload(limit)) for _ in range(8)]
        await asyncio.sleep(0)
        assert sent == []
        await upload(1)
        stuck.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())
    start, body = sent
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "busy"
    assert guard._held == 0
