"""How a server ends: in order on the first signal, at once on the second, and leaves nothing."""

from __future__ import annotations

import json
import signal
import threading

import httpx
import pytest
from support.serving import WAIT, running_server, serve_process

from nomatmul.serve.options import ServeOptions

# The box model's end token is banned: the answer ends where max_tokens says.
ENDLESS = {
    "model": "nomatmul-box",
    "prompt": "The river",
    "max_tokens": 100_000,
    "stream": True,
    "logit_bias": {"0": -100},
}


def events(response: httpx.Response):
    """The events of a stream as JSON, "[DONE]" as it is."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_idle_server_ends_with_status_0(name):
    with serve_process("--threads", 1) as process:
        status, errors = process.end(getattr(signal, name))
    assert (status, errors) == (0, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url)


def test_a_stream_ends_within_the_grace():
    body = {**ENDLESS, "max_tokens": 200}
    with (
        serve_process("--threads", 1, "--grace", 60) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=60) as response,
    ):
        news = events(response)
        first = next(news)
        assert "choices" in first
        process.popen.send_signal(signal.SIGTERM)
        rest = list(news)
        assert rest[-1] == "[DONE]"
        reasons = [e["choices"][0]["finish_reason"] for e in rest[:-1] if e.get("choices")]
        assert reasons[-1] in ("length", "stop")
        assert process.end()[0] == 0


def test_a_stream_is_cut_when_the_grace_is_over():
    with (
        serve_process("--threads", 1, "--grace", 0.5) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=ENDLESS, timeout=60) as response,
    ):
        news = events(response)
        next(news)
        process.popen.send_signal(signal.SIGTERM)
        rest = list(news)
        assert any("error" in event for event in rest if event != "[DONE]"), rest[-3:]
        status, errors = process.end()
        assert (status, len(errors.splitlines())) == (0, 1)


def test_while_it_closes_no_new_work_is_taken():
    with (
        serve_process("--threads", 1, "--grace", 30) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=ENDLESS, timeout=60) as response,
    ):
        news = events(response)  # held: a stream that nobody holds is closed
        next(news)
        process.popen.send_signal(signal.SIGTERM)
        while httpx.get(f"{process.url}/ready").status_code == 200:  # until it is noticed
            pass
        ready = httpx.get(f"{process.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "closing"})
        refused = httpx.post(f"{process.url}/v1/completions", json={**ENDLESS, "stream": False})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        process.popen.send_signal(signal.SIGTERM)
        status, errors = process.end()
        assert status == 128 + signal.SIGTERM
        assert errors.endswith(
            "running answers (1) go on for up to 30 s; a second signal ends at once\n"
        )


def test_a_second_ctrl_c_ends_at_once():
    with (
        serve_process("--threads", 1, "--grace", 600) as process,
        httpx.stream("POST", f"{process.url}/v1/completions", json=ENDLESS, timeout=60) as response,
    ):
        news = events(response)  # held: a stream that nobody holds is closed
        next(news)
        process.popen.send_signal(signal.SIGINT)
        while httpx.get(f"{process.url}/ready").status_code == 200:
            pass
        assert process.end(signal.SIGINT)[0] == 130


def test_a_signal_while_models_are_loaded_ends_it():
    with serve_process("--threads", 1, ready=False) as process:
        assert process.popen.stdout is not None
        while True:  # as soon as the process handles it
            with open(f"/proc/{process.popen.pid}/status") as file:
                caught = next(line for line in file if line.startswith("SigCgt"))
            if int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1):
                break
        assert process.end(signal.SIGTERM) == (0, "")


def test_an_ignored_signal_stays_ignored():
    with serve_process("--threads", 1, hangup=signal.SIG_IGN) as process:
        process.popen.send_signal(signal.SIGHUP)
        assert httpx.get(f"{process.url}/ready").status_code == 200
        assert process.end(signal.SIGTERM)[0] == 0


def test_nothing_is_left_running():
    before = {thread.name for thread in threading.enumerate()}
    with running_server(ServeOptions(threads=1)) as running:
        body = {"model": "nomatmul-box", "prompt": "a", "max_tokens": 2}
        httpx.post(f"{running.url}/v1/completions", json=body, timeout=WAIT).raise_for_status()
    left = [thread for thread in threading.enumerate() if thread.name not in before]
    for thread in left:
        thread.join(10)
    assert [thread.name for thread in left if thread.is_alive()] == []


def test_the_cache_is_written_at_the_end(tmp_path):
    body = {**ENDLESS, "stream": False, "max_tokens": 4, "seed": 1}
    directory, found = tmp_path / "new", []
    for _ in range(2):
        with serve_process("--threads", 1, "--state-dir", directory) as process:
            answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60).json()
            found.append((answer["choices"][0]["text"], answer["usage"]))
            assert process.end(signal.SIGTERM)[0] == 0
    assert found[0][0] == found[1][0]
    assert directory.stat().st_mode & 0o077 == 0  # it holds what people asked
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for _, usage in found]
    assert cached[0] == 0
    assert cached[1] == found[1][1]["prompt_tokens"]
