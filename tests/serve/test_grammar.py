"""Grammars: whatever a model draws, its text parses and validates, and nothing costs too much."""

from __future__ import annotations

import json

import jsonschema_rs
import numpy as np
import pytest
from chat_models import ATTENTION, END, EOT, chat_model
from chat_templates import CHATML
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from serve.vocabularies import byte_fallback_model, grammars_of, spec_of, wander

import nomatmul
from nomatmul.engine.sampling import Sampling
from nomatmul.engine.text import Detokenizer
from nomatmul.serve import grammar
from nomatmul.serve.grammar import Grammars, GrammarSpec

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
            "type": "array",
            "items": {"enum": ["r\u00e9d", "gr\u00fcn", 3, None]},
            "maxItems": 3,
        },
        "more": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -1, "maximum": 1}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "box": nomatmul.load(),
        "byte level": chat_model(tmp_path_factory.mktemp("bytes"), ATTENTION, CHATML),
        "byte fallback": byte_fallback_model(tmp_path_factory.mktemp("fallback")),
    }


@pytest.fixture(scope="module")
def compiled(models):
    return {name: grammars_of(lm) for name, lm in models.items()}


KINDS = pytest.mark.parametrize("kind", ["box", "byte level", "byte fallback"])


def text_of(lm, tokens):
    detokenizer = Detokenizer(lm.tokenizer, lm.prompt_ids("a"))
    return "".join(map(detokenizer.push, tokens)) + detokenizer.finish()


@KINDS
def test_a_grammar_sees_the_bytes_that_the_detokenizer_writes(models, compiled, kind):
    lm = models[kind]
    tokens = grammar.Vocabulary(lm.tokenizer, lm.config.vocab_size, ()).tokens
    checked = 0
    for token in range(lm.config.vocab_size):
        try:
            text = tokens[token].decode()
        except UnicodeDecodeError:
            continue  # a part of a character
        assert text_of(lm, [token]) == text
        checked += bool(text)
    assert checked > 100


@KINDS
@pytest.mark.parametrize("seed", range(4))
def test_random_weights_at_temperature_two_write_what_the_schema_says(models, compiled, kind, seed):
    lm, spec = models[kind], spec_of(PERSON)
    finished = 0
    for again in range(3):
        sampling = Sampling(temperature=2.0, seed=seed * 3 + again)
        made = lm.text_generation("a", 400, sampling, matcher=compiled[kind].compile(spec))
        session, text = lm.session(), ""
        while made.needs:
            text += made.take(session.append(made.needs))
        if made.writer.finish_reason != "length":
            jsonschema_rs.validate(PERSON, json.loads(text))
            finished += 1
    assert finished


def scalars():
    return st.one_of(
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
        st.builds(
            lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n},
            st.integers(-1000, 1000),
            st.integers(0, 100),
        ),
        st.just({"type": "number", "minimum": -2.5, "maximum": 1e6}),
        st.just({"type": ["boolean", "null"]}),
        st.just({"type": "string", "pattern": "^[a-f]{2,4}(-[0-9]+)?$"}),
        st.just({"type": "string", "format": "date"}),
        st.builds(
            lambda values: {"enum": values},
            st.lists(st.text(max_size=5) | st.integers() | st.none(), min_size=1, max_size=4),
        ),
        st.builds(lambda text: {"const": text}, st.text(max_size=8)),
    )


def larger(inner):
    names = st.text(max_size=6)
    return st.one_of(
        st.builds(
            lambda properties, required, more: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:required],
                "additionalProperties": more,
            },
            st.dictionaries(names, inner, max_size=4),
            st.integers(0, 4),
            st.just(False) | st.just({"type": "boolean"}),
        ),
        st.builds(
            lambda items, low, n: {
                "type": "array", "items": items, "minItems": low, "maxItems": low + n
            },
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(scalars(), larger, max_leaves=8), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("kind", ["box", "byte fallback"])
def test_what_a_random_schema_allows_validates(models, compiled, kind, schema, seed):
    lm = models[kind]
    try:
        matcher = compiled[kind].compile(spec_of(schema))
    except ValueError as error:  # numbers, or control characters, that cannot be written
        assume("#" not in str(error))
        raise
    made = wander(matcher, seed, lm.config.end_token_ids)
    assume(made is not None)
    text = text_of(lm, made)
    jsonschema_rs.validate(schema, json.loads(text))


@KINDS
def test_any_object_is_an_object(models, compiled, kind):
    lm, ended = models[kind], 0
    for seed in range(20):
        made = wander(
            compiled[kind].compile(GrammarSpec("json_object")), seed, lm.config.end_token_ids
        )
        if made is not None:
            assert isinstance(json.loads(text_of(lm, made)), dict)
            ended += 1
    assert ended


@pytest.mark.parametrize("spec", [GrammarSpec("json_object"), GrammarSpec("json_schema", "{}")])
@pytest.mark.parametrize(
    ("space", "fits"),
    [("", True), (" ", True), ("\n", True), ("\n" + " " * 16, True), ("\n" + " " * 17, False),
     ("  ", False), ("\n\n", False), (" \n", False), ("\t", False), ("\n\t", False)],
)  # fmt: skip
def test_white_space_is_bounded(models, compiled, spec, space, fits):
    """JSON allows any; a model that has lost its way would write nothing else."""
    matcher, lm = compiled["byte level"].compile(spec), models["byte level"]
    tokens = lm.tokenizer.encode(f'{{{space}"a"{space}:{space}1{space},', add_special_tokens=False)
    for token in tokens.ids:
        if not matcher.allowed()[token]:
            assert not fits
            return
        matcher.accept(token)
    assert fits


def test_end_tokens_are_allowed_behind_a_whole_text_only(models):
    lm = models["byte level"]
    grammars = Grammars(lm.tokenizer, lm.config.vocab_size, {END, EOT})
    matcher = grammars.compile(GrammarSpec("regex", "ab*"))
    assert np.flatnonzero(matcher.allowed()).tolist() == lm.tokenizer.encode("a").ids
    matcher.accept(lm.tokenizer.encode("a").ids[0])
    assert not matcher.done
    b = lm.tokenizer.encode("b").ids
    assert np.flatnonzero(matcher.allowed()).tolist() == sorted([*b, END, EOT])
    matcher.accept(END)
    assert matcher.done


def test_a_model_without_end_token_is_done_where_nothing_may_follow(models):
    lm = models["byte level"]
    matcher = Grammars(lm.tokenizer, lm.config.vocab_size, ()).compile(GrammarSpec("regex", "ab"))
    for token in lm.tokenizer.encode("ab").ids:
        allowed = matcher.allowed()
        assert allowed.shape == (lm.config.vocab_size,)
        assert allowed[token]
        matcher.accept(token)
    assert matcher.done


def test_ids_without_a_text_are_never_allowed(models, compiled):
    lm = models["byte fallback"]
    allowed = compiled["byte fallback"].compile(GrammarSpec("regex", "(.|\n)+")).allowed()
    named = set(lm.tokenizer.get_vocab().values())
    special = {i for i, t in lm.tokenizer.get_added_tokens_decoder().items() if t.special}
    assert not allowed[[i for i in range(len(allowed)) if i not in named or i in special]].any()


def test_copies_go_their_own_ways(models, compiled):
    first = compiled["box"].compile(GrammarSpec("regex", "[ab][cd]"))
    second, encode = first.copy(), models["box"].tokenizer.encode
    first.accept(encode("a").ids[0])
    third = first.copy()
    first.accept(encode("c").ids[0])
    assert first.done
    assert not third.done
    assert second.allowed()[encode("b").ids[0]]
    assert not third.allowed()[encode("b").ids[0]]


def test_a_token_that_does_not_fit_is_an_error(models, compiled):
    matcher = compiled["box"].compile(GrammarSpec("regex", "ab"))
    with pytest.raises(ValueError, match="the grammar cannot go on"):
        matcher.accept(models["box"].tokenizer.encode("c").ids[0])


def test_a_stop_string_ends_json_in_the_middle(models, compiled):
    lm = models["box"]
    schema = {"const": {"text": "one STOP two"}}
    made = lm.text_generation(
        "a", 100, Sampling(), stop="STOP", matcher=compiled["box"].compile(spec_of(schema))
    )
    session, text = lm.session(), ""
    while made.needs:
        text += made.take(session.append(made.needs))
    assert made.writer.finish_reason == "stop"
    assert text.replace(" ", "").replace("\n", "") == '{"text":"one'


def test_characters_across_tokens_are_whole(models, compiled):
    lm, text = models["byte level"], "\U0001f600\u00e9\u4e2d"
    matcher = compiled["byte level"].compile(spec_of({"const": text}))
    made = wander(matcher, 0, lm.config.end_token_ids)
    assert len(made) == len(json.dumps(text, ensure_ascii=False).encode())
    assert json.loads(text_of(lm, made)) == text


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one with each compilation."""
    made, inner = [], grammar.LLMatcher

    class Counting:
        def __new__(cls, *args, **kwargs):
            made.append(1)
            return inner(*args, **kwargs)

        grammar_from_regex = inner.grammar_from_regex

    monkeypatch.setattr(grammar, "LLMatcher", Counting)
    return made


@pytest.mark.parametrize(("name", "limit"), [("KEPT", 3), ("KEPT_TEXT", 3)])
def test_compiled_grammars_are_kept_within_a_bound(models, compilations, monkeypatch, name, limit):
    monkeypatch.setattr(grammar, name, limit)
    grammars = grammars_of(models["box"])
    for text in "abcab":
        grammars.compile(GrammarSpec("regex", text))
    assert len(compilations) == 3
    for text in "dabc":  # c is the one that went
        grammars.compile(GrammarSpec("regex", text))
    assert len(compilations) == 5


def test_a_grammar_in_use_is_not_made_twice(models, compilations, monkeypatch):
    monkeypatch.setattr(grammar, "KEPT", 1)
    grammars = grammars_of(models["box"])
    held = grammars.compile(GrammarSpec("regex", "a")).copy()
    grammars.compile(GrammarSpec("regex", "b"))
    again = grammars.compile(GrammarSpec("regex", "a"))
    assert len(compilations) == 2
    del held, again
    grammars.compile(GrammarSpec("regex", "b"))
    grammars.compile(GrammarSpec("regex", "c"))
    grammars.compile(GrammarSpec("regex", "a"))
    assert len(compilations) == 5


def test_a_tokenizer_of_words_is_refused():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level tokenizer or one with byte fallback"):
        Grammars(tokenizer, 2, ())
