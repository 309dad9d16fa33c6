"""/health, /ready, /metrics: what is counted adds up to what the responses said."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import running_server

from nomatmul.serve.app import create_app
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.security import protect
from nomatmul.serve.server import Server

FIELDS = ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens")


def samples(url: str) -> dict[tuple[str, ...], float]:
    """{(name, label values in the order of the labels' names): value} of /metrics."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_health_and_ready(server):
    assert httpx.get(f"{server.url}/health").json()["status"] == "ready"
    response = httpx.get(f"{server.url}/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})
    for path in ("health", "ready"):  # as load balancers may ask
        head = httpx.head(f"{server.url}/{path}")
        assert (head.status_code, head.content) == (200, b""), path


@pytest.mark.parametrize("state", ["loading", "closing"])
def test_without_models_work_is_refused_and_probes_are_answered(state):
    """The state before `Server.start` has ended, and after a signal."""
    server = Server(ServeOptions(threads=1))
    server.start({}) if state == "closing" else None
    server.close(0) if state == "closing" else None

    async def ask() -> dict[str, tuple[int, str]]:
        transport = httpx.ASGITransport(app=protect(create_app(server), server))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            responses = {path: await client.get(path) for path in PATHS}
        assert responses["/v1/models"].headers["retry-after"] == "1"
        return {path: (each.status_code, each.text) for path, each in responses.items()}

    found = asyncio.run(ask())
    assert {path: status for path, (status, _) in found.items()} == {
        "/health": 200,
        "/ready": 503,
        "/metrics": 200,
        "/v1/models": 503,
    }
    assert f'"status":"{state}"' in found["/ready"][1]
    assert "nomatmul_ready 0.0" in found["/metrics"][1]


PATHS = ("/health", "/ready", "/metrics", "/v1/models")


def test_tokens_add_up_to_what_the_responses_said():
    with running_server() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        sums = dict.fromkeys(FIELDS, 0)
        for number in range(6):
            body = {
                "model": "nomatmul-box",
                "prompt": "The river runs " * (number % 3 + 1),
                "max_tokens": 4 + number,
                "n": 1 + number % 2,
                "stream": number % 2 == 1,
                "stream_options": {"include_usage": True} if number % 2 else None,
            }
            response = client.post("/v1/completions", json=body).raise_for_status()
            if number % 2:
                events = [line[6:] for line in response.text.split("\n") if line[:6] == "data: "]
                report = next(
                    json.loads(event)
                    for event in events
                    if event != "[DONE]" and json.loads(event).get("usage")
                )
            else:
                report = response.json()
            found = {**report["usage"], **report["nomatmul"]}
            for name in FIELDS:
                sums[name] += found[name]
        refused = client.post("/v1/completions", json={"model": "other", "prompt": "a"})
        assert refused.status_code == 404
        counted = samples(running.url)
    for name, total in sums.items():
        assert total > 0 or name == "cached_tokens"
        assert counted[f"nomatmul_{name}_total", "nomatmul-box"] == total, name
        assert counted[(f"nomatmul_engine_{name}_total",)] == total, name
    assert counted["nomatmul_requests_total", "nomatmul-box", "/v1/completions", "200"] == 6
    assert counted["nomatmul_requests_total", "", "/v1/completions", "404"] == 1
    assert counted["nomatmul_first_token_seconds_count", "nomatmul-box"] == 6
    assert counted[("nomatmul_jobs_finished_total",)] == 6
    assert counted[("nomatmul_streams_running",)] == 0
    assert counted[("nomatmul_cache_file_bytes",)] == 0  # there is no directory


def test_unknown_paths_and_models_make_no_new_series():
    with running_server() as running:
        for number in range(5):
            httpx.get(f"{running.url}/{number}")
            body = {"model": f"m{number}", "prompt": "a"}
            httpx.post(f"{running.url}/v1/completions", json=body)
        found = [key for key in samples(running.url) if key[0] == "nomatmul_requests_total"]
    assert sorted(found) == [
        ("nomatmul_requests_total", "", "/v1/completions", "404"),
        ("nomatmul_requests_total", "", "other", "404"),
    ]


@pytest.fixture
def request_log():
    """Lines of the log of requests."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("nomatmul.serve.requests"), Handler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


def test_the_log_holds_counts_and_no_texts(request_log):
    options = ServeOptions(threads=1, api_keys=("secret-key-1",))
    with running_server(options) as running:
        headers = {"Authorization": "Bearer secret-key-1"}
        body = {"model": "nomatmul-box", "prompt": "xylophone", "max_tokens": 3}
        url = f"{running.url}/v1/completions"
        answer = httpx.post(url, json=body, headers=headers).json()
        httpx.post(url, json=body, headers={"Authorization": "Bearer wrong-key-2"})
        httpx.get(f"{running.url}/a%0Ab%1b[31m?prompt=xylophone", headers=headers)
    assert request_log[0].startswith("POST /v1/completions 200 ")
    words = set(request_log[0].split())
    usage = answer["usage"]
    assert {
        "client=key-1",
        "model=nomatmul-box",
        f"prompt={usage['prompt_tokens']}",
        f"completion={usage['completion_tokens']}",
    } <= words
    assert request_log[1].startswith("POST /v1/completions 401 ")
    assert request_log[2].startswith("GET /a%0Ab%1B%5B31m 404 ")
    whole = "\n".join(request_log)
    assert "xylophone" not in whole
    assert "secret" not in whole
    assert "wrong" not in whole


def test_a_clock_that_is_set_changes_no_uptime(server, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.0)
    uptime = httpx.get(server.url + "/health").json()["uptime_s"]
    assert 0 <= uptime < 86400


def test_a_server_that_closes_before_its_models_are_there_has_metrics():
    server = Server(ServeOptions())
    server.close(0)
    assert b"nomatmul_ready 0.0" in server.metrics.text()[0]
