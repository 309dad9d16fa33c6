"""Clients that send or read too slowly, too much, or no HTTP: none of them holds anything."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from support.serving import WAIT, Running, running_server, serve_process

from nomatmul.serve import connections, run
from nomatmul.serve.options import ServeOptions

ENDLESS = {
    "model": "nomatmul-box",
    "prompt": "The river",
    "max_tokens": 100_000,
    "stream": True,
    "logit_bias": {"0": -100},
}


@contextlib.contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    parts = urlsplit(running.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT) as client:
        yield client


def request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )


def read_to_the_end(client: socket.socket) -> bytes:
    """What comes until the server closes; b"" also where it resets the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            found += piece
    return found


@pytest.fixture
def hasty(monkeypatch) -> Iterator[Running]:
    """A server that waits for clients for a moment only."""
    bounds = {"reading_s": 0.3, "writing_s": 0.3}
    real = connections.connections
    monkeypatch.setattr(connections, "connections", lambda most, **_: real(min(most, 8), **bounds))
    with running_server(ServeOptions(threads=1, max_connections=8)) as running:
        yield running


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: loc",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n",
        request(ENDLESS)[:-5],
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\n5\r\n{    \r\n",
    ],
    ids=["nothing", "part of a header", "headers without end", "part of a body", "a chunk"],
)
def test_a_request_that_never_ends_is_cut_off(hasty, sent):
    with connected(hasty) as client:
        client.sendall(sent)
        start = time.monotonic()
        assert b" 200 " not in read_to_the_end(client)
        assert time.monotonic() - start < WAIT / 2


def test_a_byte_now_and_then_gains_nothing(hasty):
    with connected(hasty) as client:
        client.settimeout(0.02)
        ended = False
        start = time.monotonic()
        while not ended and time.monotonic() - start < WAIT / 2:
            try:
                client.sendall(b"G")
                ended = client.recv(1) == b""
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                ended = True
        assert ended


def test_a_reader_that_never_reads_lets_its_stream_go(hasty):
    """What the kernel and the server buffer is finite; then the stream waits, and is cut off."""
    scheduler = hasty.server.scheduler
    with connected(hasty) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {**ENDLESS, "logprobs": 5, "n": 8}  # more bytes a token
        client.sendall(request(body))
        start = time.monotonic()
        while scheduler.stats().cancelled == 0 and time.monotonic() - start < WAIT:
            time.sleep(0.05)  # nothing tells when
        assert scheduler.stats().cancelled == 1
        assert scheduler.stats().running == 0


def test_a_slow_reader_that_reads_gets_it_all(server):
    body = {**ENDLESS, "max_tokens": 64, "seed": 3, "logprobs": 5}
    whole = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT).text
    with connected(server) as client:
        client.sendall(request(body))
        client.settimeout(WAIT)
        found = b""
        while b"[DONE]" not in found:
            found += client.recv(512)
    assert found.count(b'"text"') >= 1
    assert texts(whole) == texts(found.decode())


def texts(stream: str) -> str:
    """The text of a stream's events, chunks of the transfer taken out."""
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_connections_beyond_the_limit_are_refused(hasty):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(hasty)) for _ in range(9)]
        answers = [read_to_the_end(client) for client in clients]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
    assert len(refused) >= 1
    assert b'"Too many connections"' in refused[0]
    assert httpx.get(f"{hasty.url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # a browser that speaks TLS
        b"GET / HTTQ/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * (64 << 10),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=[
        *("tls", "version", "host", "long header", "many headers", "long path"),
        *("two lengths", "negative length", "chunk"),
    ],
)
def test_what_is_no_http_is_refused(server, sent):
    with connected(server) as client:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(sent)
        answer = read_to_the_end(client)
    if answer:  # a reset may overtake the words
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.split()[1] in (b"400", b"415", b"431"), answer
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_large_prompt_is_read_or_refused_while_others_are_served(server):
    big = {"model": "nomatmul-box", "prompt": "a b " * (2 << 18), "max_tokens": 1}
    with httpx.Client(timeout=WAIT) as client, connected(server) as other:
        content = json.dumps(big).encode()
        head = request({})[: request({}).index(b"Content-Length")]
        other.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        start = time.monotonic()
        assert client.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - start < 5


def test_every_bound_is_finite():
    http = run.http_server(lambda *_: None, ServeOptions())
    assert http.config.h11_max_incomplete_event_size == connections.HEADER_BYTES
    kind = http.config.http
    assert (kind.most, kind.reading_s, kind.writing_s) == (512, 60.0, 60.0)
    assert http.config.timeout_keep_alive == connections.KEEP_ALIVE


def test_a_reader_that_never_reads_does_not_hold_up_the_end():
    ask = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serve_process("--threads", 1) as process:
        parts = urlsplit(process.url)
        with socket.create_connection((parts.hostname, parts.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(ask * 2000)  # answers of more than a MB, one after the other
            before, now = -1, 0
            while now != before or not now:  # until no further one goes out
                time.sleep(0.1)
                before, now = now, answered(process.url)
            assert now < 2000
            assert process.end(signal.SIGTERM) == (0, "")


def answered(url: str) -> int:
    """Requests for /v1/models that a server has answered to the end."""
    found = re.search(
        r'^nomatmul_requests_total\{.*"/v1/models",.*\} (\S+)$',
        httpx.get(f"{url}/metrics").text,
        re.MULTILINE,
    )
    return int(float(found[1])) if found else 0
