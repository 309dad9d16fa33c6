"""Named states: what is read once is not computed again, and answers are those of the whole."""

from __future__ import annotations

import httpx
import pytest
from support.serving import running_server

from nomatmul.serve import prepare
from nomatmul.serve.job import Busy
from nomatmul.serve.options import ServeOptions

BOX = "nomatmul-box"
TEXT = "The river runs through the old town and on to the sea.\n"
MESSAGES = [{"role": "system", "content": TEXT}, {"role": "user", "content": "A short story."}]
ASK = {"model": BOX, "max_tokens": 12, "seed": 4}


@pytest.fixture
def running():
    with running_server() as running:
        yield running


@pytest.fixture
def ask(running):
    def send(method, path, status=200, **body):
        response = httpx.request(method, running.url + path, json=body or None)
        assert response.status_code == status, response.text
        return response.json()

    return send


def cold(path, body):
    with running_server(ServeOptions(threads=1, state_cache=0)) as running:
        return httpx.post(running.url + path, json=body).json()


def test_a_prompt_behind_a_state_is_answered_as_the_whole(ask):
    saved = ask("PUT", "/v1/states/town", model=BOX, prompt=TEXT)
    assert (saved["id"], saved["model"]) == ("town", BOX)
    assert saved["tokens"] == saved["usage"]["prompt_tokens"]
    assert saved["usage"]["completion_tokens"] == 0
    answer = ask("POST", "/v1/completions", **ASK, prompt="In the town", state="town")
    whole = cold("/v1/completions", {**ASK, "prompt": TEXT + "In the town"})
    assert answer["choices"] == whole["choices"]
    assert answer["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= saved["tokens"] - 1


def test_a_text_whose_last_token_changes_is_not_read_again(ask):
    text = TEXT * 5 + "In "  # the space belongs to the next word's token
    saved = ask("PUT", "/v1/states/town", model=BOX, prompt=text)
    answer = ask("POST", "/v1/completions", **ASK, prompt="the town", state="town")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == saved["tokens"] - 4
    whole = cold("/v1/completions", {**ASK, "prompt": text + "the town"})
    assert answer["choices"] == whole["choices"]


def test_messages_behind_a_state_are_answered_as_the_whole(ask):
    saved = ask("PUT", "/v1/states/story", model=BOX, messages=MESSAGES)
    own = [{"role": "assistant", "content": " Once"}, {"role": "user", "content": "Go on."}]
    answer = ask("POST", "/v1/chat/completions", **ASK, messages=own, state="story")
    whole = cold("/v1/chat/completions", {**ASK, "messages": [*MESSAGES, *own]})
    assert answer["choices"] == whole["choices"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == saved["tokens"]


def test_states_are_listed_replaced_and_deleted(ask):
    assert ask("GET", "/v1/states")["data"] == []
    for name, prompt in (("b", TEXT), ("a", TEXT), ("a", TEXT * 2)):
        ask("PUT", f"/v1/states/{name}", model=BOX, prompt=prompt)
    listed = ask("GET", "/v1/states")["data"]
    assert [(state["id"], state["model"]) for state in listed] == [("a", BOX), ("b", BOX)]
    assert listed[0]["tokens"] > listed[1]["tokens"]
    assert ask("DELETE", "/v1/states/a")["deleted"] is True
    assert [state["id"] for state in ask("GET", "/v1/states")["data"]] == ["b"]
    assert ask("DELETE", "/v1/states/a", 404)["error"]["code"] == "state_not_found"
    ask("DELETE", f"/v1/states/b?model={BOX}")
    error = ask("POST", "/v1/completions", 404, **ASK, prompt="x", state="b")["error"]
    assert (error["param"], error["code"]) == ("state", "state_not_found")


def test_a_state_is_whole_as_soon_as_it_is_there(running, ask, monkeypatch):
    """Between its name and its text there is nothing that could fail, or that others see."""

    def busy(work, client=""):
        raise Busy(1.0)

    monkeypatch.setattr(running.server.scheduler, "call", busy)
    ask("PUT", "/v1/states/town", model=BOX, prompt=TEXT)
    ask("POST", "/v1/completions", **ASK, prompt="In the town", state="town")


def test_a_long_text_behind_a_name_is_cut_off_the_event_loop(ask, monkeypatch):
    offloaded = []
    original = prepare.offload
    monkeypatch.setattr(
        prepare, "offload", lambda *arguments: offloaded.append(1) or original(*arguments)
    )
    ask("PUT", "/v1/states/book", model=BOX, prompt="x")
    ask("PUT", "/v1/states/talk", model=BOX, messages=MESSAGES)
    assert not offloaded
    ask("POST", "/v1/completions", **ASK, prompt="In the town", state="book")
    own = [{"role": "user", "content": "Go on."}]
    ask("POST", "/v1/chat/completions", **ASK, messages=own, state="talk")
    assert len(offloaded) == 2


def test_states_outlive_the_server(tmp_path):
    options = ServeOptions(threads=1, state_dir=tmp_path)
    body = {**ASK, "prompt": "In the town", "state": "town"}
    with running_server(options) as running:
        url = running.url + "/v1/states/town"
        saved = httpx.put(url, json={"model": BOX, "prompt": TEXT}).json()
        before = httpx.post(running.url + "/v1/completions", json=body).json()
    with running_server(options) as running:
        assert httpx.get(running.url + "/v1/states").json()["data"][0]["id"] == "town"
        after = httpx.post(running.url + "/v1/completions", json=body).json()
    assert after["choices"] == before["choices"]
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] >= saved["tokens"] - 1


def test_a_state_that_has_no_room_is_refused():
    with running_server(ServeOptions(threads=1, state_cache=1000)) as running:
        url = running.url + "/v1/states/big"
        response = httpx.put(url, json={"model": BOX, "prompt": TEXT})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "state_too_large"
        assert httpx.get(running.url + "/v1/states").json()["data"] == []


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("s", {}, "messages"),
        ("s", {"prompt": "x", "messages": MESSAGES}, "messages"),
        ("s", {"prompt": ""}, "prompt"),
        ("s", {"prompt": "x" * ((1 << 20) + 1)}, "prompt"),
        ("s", {"messages": []}, "messages"),
        ("s", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("s", {"prompt": "x", "surprise": 1}, "surprise"),
        ("-s", {"prompt": "x"}, "name"),
        ("s" * 200, {"prompt": "x"}, "name"),
    ],
)
def test_what_is_refused_is_named(server, name, body, param):
    url = f"{server.url}/v1/states/{name}"
    response = httpx.put(url, json={"model": BOX, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_state_is_of_one_kind(ask):
    ask("PUT", "/v1/states/town", model=BOX, prompt=TEXT)
    error = ask("POST", "/v1/chat/completions", 400, **ASK, messages=MESSAGES, state="town")
    assert error["error"]["param"] == "state"
    error = ask("POST", "/v1/completions", 400, **ASK, prompt=[1, 2], state="town")
    assert error["error"]["param"] == "prompt"
    assert ask("PUT", "/v1/states/x", 404, model="other", prompt="x")["error"]["param"] == "model"


def test_without_a_cache_there_are_no_states():
    with running_server(ServeOptions(threads=1, state_cache=0)) as running:
        url = running.url + "/v1/states"
        assert httpx.put(url + "/s", json={"model": BOX, "prompt": "x"}).status_code == 400
        assert httpx.get(url).json()["data"] == []
