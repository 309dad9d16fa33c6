"""Two models in the box: `chat` and `serve` take the one that talks, all else the base."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from train_jobs import tiny_config, train_here

import nomatmul
from nomatmul.convert.packing import pack
from nomatmul.engine import loading
from nomatmul.serve.models import BOX_NAME, model_paths, open_models

PAIRS = [("where is the boat?", "under the bridge"), ("who waits?", "the morning light")]
TOTAL = 30 * 10**6  # bytes of all models that the package carries


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model that has learnt two answers, each the whole of a conversation or its half."""
    folder = tmp_path_factory.mktemp("talker")
    says = [
        [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        for pair in PAIRS
    ]
    rows = [*says, says[0] + says[1], says[1] + says[0]] * 40
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = tiny_config(
        steps=250, sequence_length=48, batch_size=8, micro_batch_size=8, eval_interval=0,
        checkpoint_interval=0, diagnostics_interval=0, schedule="cosine",
    )  # fmt: skip
    train_here(config, file, folder / "run")
    pack(folder / "run", folder / "packed", check=False)
    return folder / "packed"


@pytest.fixture
def lines(run, monkeypatch):
    def lines(*said: str, options: tuple[str, ...] = ()) -> list[dict]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
        words = ("--json", "--temperature", "0", "--max-tokens", "60", "--threads", "1", *options)
        done = run("chat", *words)
        assert done.status == 0, done.err
        return [json.loads(line) for line in done.out.splitlines()]

    return lines


def test_chat_answers_in_turn_and_stops(lines, talker, monkeypatch):
    monkeypatch.setattr(loading, "TALKING_BOX", talker)
    found = lines(*(question for question, _ in PAIRS))
    assert [turn["text"] for turn in found] == [answer for _, answer in PAIRS]
    assert [turn["finish_reason"] for turn in found] == ["end", "end"]
    assert [turn["template"] for turn in found] == [True, True]
    # the second turn computes its own words: the end of the first was fed with the state
    assert [turn["state"] for turn in found] == ["new", "continued"]
    assert found[1]["computed_tokens"] < found[0]["context"]


def test_without_a_talking_model_chat_goes_on_with_the_base(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "TALKING_BOX", tmp_path / "none")
    (turn,) = lines("The river", options=("--max-tokens", "4"))
    assert turn["template"] is False
    assert model_paths(()) == {BOX_NAME: loading.BOX}
    monkeypatch.setattr(loading, "BOX", tmp_path / "none")
    with pytest.raises(ValueError, match="this installation carries no model"):
        loading.talking_directory()


def test_without_jinja2_chat_says_what_is_missing(run, talker, monkeypatch):
    monkeypatch.setattr(loading, "TALKING_BOX", talker)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "jinja2" else find(n))
    done = run("chat", "--threads", "1")
    assert done.status == 0
    assert done.err.count('pip install "nomatmul[chat]"') == 1


def test_the_server_talks_and_everything_else_is_the_base(run, talker, monkeypatch):
    monkeypatch.setattr(loading, "TALKING_BOX", talker)
    served = open_models(model_paths(()), threads=1)[BOX_NAME]
    assert (served.directory, served.template) == (talker, "model")
    rendered = served.chat_ids([{"role": "user", "content": PAIRS[0][0]}])
    assert served.lm.generate(list(rendered.ids), max_tokens=60) == PAIRS[0][1]
    assert nomatmul.load(threads=1).path == loading.BOX
    done = run("generate", "--prompt", PAIRS[0][0], "--max-tokens", "3", "--temperature", "0")
    assert PAIRS[0][1] not in done.out


def test_the_models_that_the_package_carries_are_small_and_say_where_they_are_from():
    boxes = [path for path in (loading.BOX, loading.TALKING_BOX) if path.is_dir()]
    boxes += [path for path in loading.BOX.parent.glob("box-*") if path not in boxes]
    sizes = {path.name: sum(f.stat().st_size for f in path.iterdir()) for path in boxes}
    assert "box" in sizes
    assert sum(sizes.values()) <= TOTAL, sizes
    for path in boxes:
        card = (path / "README.md").read_text()
        assert card.startswith("---\n")
        assert "\nlicense: " in card
        assert (path / "ATTRIBUTION.md").stat().st_size > 100
