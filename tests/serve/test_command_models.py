"""Models that `nomatmul serve` is given: names, templates, and files that change under it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from chat_models import ATTENTION, write_chat_files
from random_packed import write_random
from support.serving import WAIT, running_server, serve_process

from nomatmul.engine.loading import BOX
from nomatmul.formats.packed.layout import Forms
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.server import Server

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def chatter(tmp_path: Path) -> Path:
    """A packed model with a template of its own."""
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    files = write_chat_files(tmp_path / "files", template, temperature=0.5)
    tokenizer = files / "tokenizer.json"
    forms = Forms.of(ATTENTION)
    write_random(tmp_path / "chatter", ATTENTION, forms, tokenizer_path=tokenizer)
    return tmp_path / "chatter"


def test_several_models_by_name(chatter):
    paths = (f"one={chatter}", f"box={BOX}")
    with running_server(ServeOptions(models=paths, threads=1, kv="int8")) as running:
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert {each["id"]: each["nomatmul"]["chat_template"] for each in listed} == {
            "one": "model",
            "box": "plain",
        }
        for name in ("one", "box"):
            body = {"model": name, "messages": QUESTION, "max_completion_tokens": 2}
            answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=WAIT)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name


@pytest.mark.parametrize("template", [None, "plain", "file"])
def test_a_template_may_be_replaced(chatter, tmp_path, template):
    if template == "file":
        (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    chosen = str(tmp_path / "t.jinja") if template == "file" else template
    server = Server(ServeOptions(models=(str(chatter),), threads=1, chat_template=chosen))
    try:
        server.start()
        rendered = server.models["chatter"].chat_ids(QUESTION)
    finally:
        server.close(0)
    expected = {None: "<|im_start|>Hello<|im_end|>", "plain": "Hello", "file": "Hello!"}
    assert rendered.text == expected[template]


def test_files_that_are_replaced_are_warned_of_once(chatter, caplog):
    with running_server(ServeOptions(models=(str(chatter),), threads=1)) as running:
        model = running.server.models["chatter"]
        assert not model.changed()
        (chatter / "config.json").write_text("{}")
        assert model.changed()
        assert model.changed()
        body = {"model": "chatter", "prompt": "Hello", "max_tokens": 2}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=WAIT)
        assert answer.status_code == 200
        card = httpx.get(f"{running.url}/v1/models/chatter").json()
        assert card["nomatmul"]["files_changed"] is True
    assert caplog.text.count("have changed") == 1


def test_a_file_that_is_cut_short_does_not_end_the_server(chatter):
    with serve_process(chatter, "--threads", 1) as process:
        for _ in range(2):
            body = {"model": "chatter", "prompt": "Hello", "max_tokens": 3, "seed": 1}
            answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=WAIT)
            assert answer.status_code == 200
            os.truncate(chatter / "model.safetensors", 0)
        assert process.end(signal.SIGTERM)[0] == 0
