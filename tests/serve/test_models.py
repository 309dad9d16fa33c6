"""Models as they are served: conversations as token ids, names, defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_models import ATTENTION, BEGIN, END, EOT, RECURRENT, START, chat_model
from chat_templates import CHATML

from nomatmul import cli
from nomatmul.engine import load, loading
from nomatmul.engine.loading import BOX
from nomatmul.serve.models import model_paths, open_models, served_model
from nomatmul.serve.rendered import plain_text


def say(*words: str) -> list[dict[str, str]]:
    """A conversation, the first word from a user."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": word} for n, word in enumerate(words)]


@pytest.fixture(scope="module")
def box():
    return served_model("box", load(BOX, threads=1), BOX)


@pytest.fixture
def chatter(tmp_path: Path):
    lm = chat_model(tmp_path / "m", RECURRENT, CHATML)
    return served_model("chatter", lm, tmp_path / "m")


def test_the_plain_template():
    system = {"role": "system", "content": "Be brief."}
    tool = {"role": "tool", "content": "5"}
    silent = {"role": "assistant", "content": None}
    assert plain_text([system, *say("A", "B", "C")]) == ("Be brief.\nAB\nC", [9, 11, 12, 14])
    assert plain_text([*say("A"), silent, tool]) == ("A\n5", [1, 1, 3])


def test_a_question_alone_is_a_prompt(box):
    rendered = box.chat_ids(say("The river"))
    assert rendered.ids == box.prompt_ids("The river")
    assert (rendered.text, box.template, box.chat, box.source) == ("The river", "plain", None, "")


def test_boundaries_of_the_plain_template_are_ends_of_messages(box):
    rendered = box.chat_ids(say("The river", " runs to the sea", "And then?"))
    decode = box.lm.tokenizer.decode
    assert len(rendered.boundaries) == 3
    for place, text in zip(
        rendered.boundaries,
        ("The river", "The river runs to the sea", "The river runs to the sea\nAnd then?"),
        strict=True,
    ):
        assert decode(list(rendered.ids[:place]), skip_special_tokens=True).strip() == text


def test_boundaries_where_a_token_crosses_the_end(box):
    """The state is then worth keeping before that token."""
    whole = box.chat_ids(say("The riv", "er"))
    assert whole.ids == box.prompt_ids("The river")
    assert whole.boundaries[-1] == len(whole.ids)
    assert whole.boundaries[0] < len(whole.ids)


def test_the_plain_template_lets_nobody_type_control_tokens(box):
    name = box.lm.tokenizer.id_to_token(box.lm.config.eos_token_id)
    rendered = box.chat_ids(say(f"a{name}b"))
    assert box.lm.config.eos_token_id not in rendered.ids[1:]


def test_a_template_of_its_own(chatter):
    rendered = chatter.chat_ids(say("A", "B", "C"))
    assert rendered.text == (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [rendered.ids[place - 1] for place in rendered.boundaries] == [END] * 3
    assert rendered.ids.count(START) == 4
    assert chatter.end_tokens == {END}
    assert chatter.template == "model"
    assert "im_start" in chatter.source
    assert chatter.chat_ids(say("A"), add_generation_prompt=False).text.endswith("<|im_end|>\n")


def test_end_tokens_of_the_config_end_messages_too(tmp_path):
    template = "<|begin|>{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    lm = chat_model(tmp_path / "m", ATTENTION, template)
    rendered = served_model("m", lm, tmp_path / "m").chat_ids(say("ab", "c"))
    assert rendered.ids[0] == BEGIN
    assert [rendered.ids[place - 1] for place in rendered.boundaries] == [EOT, EOT]


def test_names(tmp_path):
    assert list(model_paths(())) == ["nomatmul-box"]
    paths = model_paths(("a", str(tmp_path / "b"), "c=d/e", "x=y"))
    assert {name: str(path) for name, path in paths.items()} == {
        "a": "a",
        "b": str(tmp_path / "b"),
        "c": "d/e",
        "x": "y",
    }
    for nothing in ("", "a="):
        with pytest.raises(ValueError, match="the path of a model must be a non-empty text"):
            model_paths((nothing,))


def test_the_models_of_the_box_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "TALKING_BOX", tmp_path / "none")
    monkeypatch.setattr(loading, "ENCODER_BOX", tmp_path / "box-encoder")
    with pytest.raises(ValueError, match="this installation carries no encoder"):
        model_paths(("nomatmul-box", "nomatmul-box-encoder"))
    (tmp_path / "box-encoder").mkdir()
    (tmp_path / "box-encoder/config.json").touch()
    assert model_paths(("nomatmul-box", "embed=nomatmul-box-encoder")) == {
        "nomatmul-box": BOX,
        "embed": tmp_path / "box-encoder",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nomatmul-box-encoder").mkdir()  # one's own
    assert model_paths(("nomatmul-box-encoder",)) == {
        "nomatmul-box-encoder": Path("nomatmul-box-encoder")
    }


def test_an_encoder_writes_no_text(crammed_tiny, tmp_path):
    packed = tmp_path / "packed"
    assert cli.main(["pack", str(crammed_tiny), str(packed), "--no-check", "--json"]) == 0
    model = open_models({"e": packed}, threads=1)["e"]
    assert (model.kind, model.chat, model.template) == ("encoder", None, None)
    for work in (lambda: model.chat_ids(say("A")), lambda: model.prompt_ids("A")):
        with pytest.raises(ValueError, match="'e' is an encoder, which continues no text"):
            work()
