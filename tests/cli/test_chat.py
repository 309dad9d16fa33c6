"""`chat` with a chat template: what the model is told, how it samples, what is reported."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_models import END, RECURRENT, write_chat_files
from chat_templates import CHATML, QWEN3
from model_files import write_training

from nomatmul import cli
from nomatmul.engine import language_model
from nomatmul.formats.chat_template import find_template

H = 39  # the token of this letter
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": 258}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A training checkpoint with a chat template and defaults of sampling."""
    directory = tmp_path_factory.mktemp("chat") / "source"
    write_training(directory, RECURRENT, np.random.default_rng(5))
    return write_chat_files(directory, QWEN3, **SAMPLED)


@pytest.fixture(scope="module")
def model(source) -> Path:
    """Its packed form."""
    target = source.with_name("packed")
    assert cli.main(["pack", str(source), str(target), "--no-check", "--json"]) == 0
    return target


@pytest.fixture
def chat(run, monkeypatch):
    """chat(model, lines, *options): what the command did."""

    def chat(model, lines, *options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", model, "--max-tokens", "5", "--seed", "1", *options)

    return chat


def turns(done):
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_pack_takes_template_and_defaults_along(source, model):
    assert (model / "chat_template.jinja").read_text() == QWEN3
    assert find_template(model) == QWEN3
    copied = (model / "generation_config.json").read_bytes()
    assert copied == (source / "generation_config.json").read_bytes()
    config = json.loads((model / "config.json").read_text())["model"]
    assert config["eos_token_id"] == [259, 258]


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_what_was_packed_is_checked(model, name, run, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    (changed / name).write_text('{"top_k": 1}')
    done = run("chat", "--model", changed)
    assert (done.status, done.out) == (1, "")
    assert f"{name} does not match the checksum in model.safetensors" in done.err
    (changed / name).unlink()
    assert f"{name}: No such file" in run("chat", "--model", changed).err


def test_turns_say_what_was_used(chat, model, monkeypatch):
    class Script:
        """Says H, then ends the turn, again and again."""

        def __init__(self, *_) -> None:
            self.ids = itertools.cycle([H, END])

        def sample(self, logits_V, allowed=None):
            return next(self.ids)

    monkeypatch.setattr(language_model, "Sampler", Script)
    first, second = turns(chat(model, ["Hello", "More"], "--json", "--system", "Be brief."))
    sampling = {**first["sampling"]}
    assert sampling.pop("seed") == 1
    assert sampling == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert (first["prompt"], first["template"], first["state"]) == ("Hello", True, "new")
    assert first["reused_tokens"] == 0
    words = ("system\nBe brief.", "\n", "user\nHello", "\n", "assistant\n")
    assert first["computed_tokens"] == sum(map(len, words)) + 5  # and control tokens
    assert (first["text"], first["finish_reason"]) == ("H", "end")
    assert first["context"] == first["computed_tokens"] + 2
    assert second["state"] == "continued"
    assert second["reused_tokens"] == first["context"]
    assert second["context"] == second["reused_tokens"] + second["computed_tokens"] + 2


def test_the_command_line_wins(chat, model):
    options = ("--temperature", "0", "--top-k", "0", "--min-p", "0.1", "--repetition-penalty", "2")
    (turn,) = turns(chat(model, ["Hello"], "--json", *options))
    assert turn["sampling"] == {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 2.0,
        "seed": 1,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"do_sample": False, "temperature": 0.6}, (0.0, 1.0, 1.0)),
        ({"repetition_penalty": 1.3}, (1.0, 1.0, 1.3)),
        ({"eos_token_id": 258, "temperature": None}, (0.8, 0.95, 1.0)),
    ],
)
def test_defaults_of_a_model(chat, model, tmp_path, given, expected):
    changed = repacked(model, tmp_path, given)
    (turn,) = turns(chat(changed, ["Hello"], "--json"))
    found = turn["sampling"]
    keys = ("temperature", "top_p", "repetition_penalty")
    assert tuple(found[key] for key in keys) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"top_k": 1.5}, "top_k must be a whole number, found 1.5"),
        ({"top_p": 3}, "top_p must be a finite number above 0 and at most 1, got 3"),
    ],
)
def test_defaults_that_cannot_be(chat, model, tmp_path, given, message):
    done = chat(repacked(model, tmp_path, given), ["Hello"])
    assert (done.status, done.out) == (1, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def repacked(model: Path, tmp_path: Path, generation: dict) -> Path:
    """The packed model as somebody has it who added another generation_config.json later."""
    from nomatmul.formats.packed import PackedReader

    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    weights = changed / "model.safetensors"
    data = weights.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    del header["__metadata__"]["beside_sha256"]
    text = json.dumps(header, separators=(",", ":")).encode()
    weights.write_bytes(data[:8] + text.ljust(length - 8) + data[length:])
    (changed / "generation_config.json").write_text(json.dumps(generation))
    PackedReader(changed)
    return changed


def test_without_template_it_goes_on_from_the_text(chat, model):
    options = ("--json", "--no-template", "--prefix", "User: ")
    first, second = turns(chat(model, ["Hello", "More"], *options))
    assert (first["template"], first["prompt"]) == (False, "User: Hello")
    assert first["computed_tokens"] == 1 + len("User: Hello")  # and the start token
    assert second["state"] == "continued"
    assert second["computed_tokens"] == len("User: More")


def test_thinking_and_state_over_turns(chat, model, tmp_path):
    (turn,) = turns(chat(model, ["Hello"], "--json", "--no-thinking"))
    (with_thoughts,) = turns(chat(model, ["Hello"], "--json"))
    assert turn["computed_tokens"] == with_thoughts["computed_tokens"] + len("\n\n\n\n") + 2
    state = tmp_path / "a b.state"
    lines = ["Hello", f"/save {state}", "More", f"/load {state}", "More", "/reset", "More"]
    done = chat(model, lines, "--json", "--temperature", "0")
    first, second, again, fresh = turns(done)
    keys = ("text", "state", "reused_tokens", "computed_tokens")
    assert [second[key] for key in keys] == [again[key] for key in keys]
    assert (fresh["state"], fresh["reused_tokens"]) == ("new", 0)
    assert f"saved {first['context']} tokens" in done.err
    assert json.loads(Path(f"{state}.json").read_text())["messages"][0]["content"] == "Hello"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--system", "x", "--no-template"), "--system is for models with a chat template: --no-t"),
        (("--no-thinking", "--no-template"), "--no-thinking is for models with a chat template"),
        (("--suffix", "x"), "--suffix goes with --no-template: this model has a chat template"),
    ],
)
def test_options_that_do_not_go_together(chat, model, options, message):
    done = chat(model, ["Hello"], *options)
    assert (done.status, done.out) == (1, "")
    assert message in done.err


def test_a_model_without_template(chat, packed):
    done = chat(packed, ["w1"], "--system", "x")
    assert (
        "--system is for models with a chat template: this model has no chat template" in done.err
    )
    (turn,) = turns(chat(packed, ["w1"], "--json"))
    assert (turn["template"], turn["sampling"]["repetition_penalty"]) == (False, 1.1)
    assert (turn["sampling"]["temperature"], turn["sampling"]["top_p"]) == (0.8, 0.95)


def test_without_jinja2_there_is_a_way(chat, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "nomatmul.formats.template_sandbox", raising=False)
    done = chat(model, ["Hello"])
    assert (done.status, done.out) == (1, "")
    assert 'pip install "nomatmul[chat]", or chat with --no-template' in done.err
    assert chat(model, ["Hello"], "--no-template").status == 0


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__ }}", "{% for i in range(10**9) %}{% endfor %}"]
)
def test_a_model_with_an_unsafe_template_is_not_packed(run, source, tmp_path, template):
    changed, target = tmp_path / "changed", tmp_path / "packed"
    shutil.copytree(source, changed)
    (changed / "chat_template.jinja").write_text(template)
    done = run("pack", changed, target, "--no-check")
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert f"{changed}: the chat template fails: " in done.err
    assert list(tmp_path.iterdir()) == [changed]
    (changed / "chat_template.jinja").write_text("{{ unknown.name }}")
    done = run("pack", changed, target, "--no-check", "--json")
    assert done.status == 0
    assert "'unknown' is undefined; chat with --no-template" in done.err


def test_named_templates_without_a_default_cost_one_warning(run, source, tmp_path):
    changed, target = tmp_path / "changed", tmp_path / "packed"
    shutil.copytree(source, changed)
    named = [{"name": name, "template": QWEN3} for name in ("tool_use", "rag")]
    (changed / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    done = run("pack", changed, target, "--no-check", "--json")
    assert done.status == 0
    assert done.err.count("has chat templates rag, tool_use, and none is the default") == 1
    with pytest.warns(UserWarning, match="none is taken"):
        assert find_template(target) is None


def test_an_unsafe_template_is_one_line(chat, model, tmp_path):
    changed = repacked(model, tmp_path, {})
    (changed / "chat_template.jinja").write_text("{{ messages.__class__ }}")
    done = chat(changed, ["Hello"])
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        "nomatmul: error: the chat template fails: access to '__class__' of a list is forbidden"
    ]
    (changed / "chat_template.jinja").write_text(CHATML)
    assert chat(changed, ["Hello"]).status == 0
