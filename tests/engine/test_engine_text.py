"""Text while it is made: whole characters, stop strings, prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG
from hypothesis import given
from hypothesis import strategies as st
from model_files import write_packed, write_published, write_tokenizer
from tokenizers import Tokenizer

from nomatmul.engine import LanguageModel, TextStream, load, random_model
from nomatmul.engine.text import BROKEN, Detokenizer, StopCutter, checked_stop
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig

TEXT = "Zürich 東京 🦆🏳️‍🌈 naïve – done"


@pytest.fixture
def tokenizer(text_lm: LanguageModel) -> object:
    return text_lm.tokenizer


def test_pieces_are_whole_characters_and_join_to_the_text(text_lm: LanguageModel) -> None:
    tokenizer = text_lm.tokenizer
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT.encode())  # one token a byte: the hardest case
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.finish()]
    assert BROKEN not in "".join(pieces)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_an_unfinished_character_is_left_out(text_lm: LanguageModel) -> None:
    ids = text_lm.tokenizer.encode("ok 🦆").ids[:-1]
    detokenizer = Detokenizer(text_lm.tokenizer)
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == "ok "


def test_bytes_that_never_become_a_character_do_not_block_the_text(
    text_lm: LanguageModel,
) -> None:
    (lone,) = set(text_lm.tokenizer.encode("é").ids[:1])
    letters = text_lm.tokenizer.encode("abc").ids
    detokenizer = Detokenizer(text_lm.tokenizer)
    pieces = [detokenizer.push(token) for token in [lone] * 20 + letters]
    assert "".join(pieces).endswith("abc")


@given(st.text(max_size=60))
def test_any_text_comes_back(text_lm_module: LanguageModel, text: str) -> None:
    tokenizer = text_lm_module.tokenizer
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(t) for t in tokenizer.encode(text).ids] + [detokenizer.finish()]
    if BROKEN not in text:
        assert "".join(pieces) == text


@pytest.fixture(scope="module")
def text_lm_module(text_lm: LanguageModel) -> LanguageModel:
    return text_lm


def test_context_keeps_a_leading_space_that_the_tokenizer_drops() -> None:
    class Words:
        """Decodes as SentencePiece does: a space before each word but the first."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(f"w{i}" for i in ids)

    detokenizer = Detokenizer(Words(), context=[1, 2])
    assert [detokenizer.push(3), detokenizer.push(4)] == [" w3", " w4"]


def stream(
    text_lm: LanguageModel, text: str, stop: list[str], end: int | None = None
) -> TextStream:
    ids: Iterator[int] = (token for token in text_lm.tokenizer.encode(text).ids)
    return TextStream(text_lm.tokenizer, [], ids, checked_stop(stop), end)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["lo wo"], "hel"),
        (["world", "wor"], "hello "),
        (["xyz"], "hello world, well"),
        (["ll", "o w"], "he"),
        (["well"], "hello world, "),
        (["l", "el"], "h"),
        (["wellness"], "hello world, well"),
    ],
)
def test_stop_strings_across_tokens(text_lm: LanguageModel, stop: list[str], expected: str) -> None:
    made = stream(text_lm, "hello world, well", stop)
    pieces = list(made)
    assert "".join(pieces) == expected
    full = "hello world, well"
    assert made.finish_reason == ("stop" if expected != full else "length")
    for cut in range(len(pieces)):  # no piece ever shows a part of what is cut off
        assert expected.startswith("".join(pieces[: cut + 1]))


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_cutter_equals_a_search_in_the_whole_text(text: str, stop: list[str]) -> None:
    cutter = StopCutter(stop)
    pieces = "".join(cutter.push(c) for c in text)
    if not cutter.stopped:
        pieces += cutter.finish()
    # the first stop string to be complete ends the text; of those, the one that begins first
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    first_end = min((end for end, _ in ends), default=None)
    expected = text if first_end is None else text[: min(b for e, b in ends if e == first_end)]
    assert pieces == expected


@pytest.mark.parametrize("bad", ["", [""], ["a", ""], [3]])
def test_empty_stop_strings_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="stop string must be a non-empty text"):
        checked_stop(bad if bad != "" else [""])  # type: ignore[arg-type]


def test_end_token_ends_the_text(text_lm: LanguageModel) -> None:
    end = text_lm.tokenizer.encode("w").ids[0]
    made = stream(text_lm, "hello world", [], end)
    assert "".join(made) == "hello "
    assert made.finish_reason == "end"
    assert end not in made.token_ids


def test_generate_is_repeatable_and_streams_the_same(text_lm: LanguageModel) -> None:
    for options in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}, {"repetition_penalty": 1.3}):
        text = text_lm.generate("Hello", max_tokens=40, **options)
        made = text_lm.stream("Hello", max_tokens=40, **options)
        assert "".join(made) == text
        assert made.finish_reason == "length"
        assert len(made.token_ids) == 40


def test_generate_follows_the_logits(text_lm: LanguageModel) -> None:
    ids = text_lm.tokenizer.encode("Hello").ids
    made = text_lm.generate_ids(ids, max_tokens=6)
    assert made == text_lm.logits([*ids, *made])[len(ids) - 1 : -1].argmax(axis=1).tolist()


def test_no_tokens_no_text(text_lm: LanguageModel) -> None:
    assert text_lm.generate("Hello", max_tokens=0) == ""


def test_a_session_goes_on_from_what_was_made(text_lm: LanguageModel) -> None:
    session = text_lm.session()
    first = text_lm.stream("Hello", max_tokens=5, session=session)
    list(first)
    assert session.position == len(first.prompt_ids) + 5
    second = text_lm.stream(" world", max_tokens=5, session=session)
    list(second)
    ids = [*first.prompt_ids, *first.token_ids, *second.prompt_ids]
    assert second.token_ids == text_lm.generate_ids(ids, max_tokens=5)
    third = text_lm.stream("!", max_tokens=0, session=session)
    assert list(third) == []
    assert session.position == len(ids) + 5 + 1


def test_a_stream_closed_early_leaves_the_session_in_step(text_lm: LanguageModel) -> None:
    session = text_lm.session()
    made = text_lm.stream("Hello", max_tokens=50, session=session)
    next(made)
    made.close()
    assert session.position == len(made.prompt_ids) + len(made.token_ids)


def test_bos_starts_a_new_sequence_only(make_packed: Callable[..., Path]) -> None:
    config = ModelConfig(**{**CONFIG.to_dict(), "bos_token_id": 300})
    lm = load(make_packed(config))
    assert lm.prompt_ids("ab") == [300, *lm.tokenizer.encode("ab").ids]
    assert lm.prompt_ids("ab", fresh=False) == lm.tokenizer.encode("ab").ids
    session = lm.session()
    list(lm.stream("ab", max_tokens=1, session=session))
    assert lm.stream("ab", max_tokens=1, session=session).prompt_ids[0] != 300


def test_text_needs_a_tokenizer() -> None:
    lm = random_model(CONFIG, threads=1)
    assert lm.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer"):
        lm.generate("Hello")
    assert len(lm.generate_ids([1, 2], max_tokens=3)) == 3


def test_a_prompt_is_not_cut_or_padded_as_the_tokenizer_file_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_published(source, np.random.default_rng(0))
    path = write_tokenizer(source)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=6, pad_id=5, pad_token="w5")
    tokenizer.save(str(path))
    write_packed(tmp_path / "packed", open_checkpoint(source), tokenizer=path)
    lm = load(tmp_path / "packed", threads=1)
    assert lm.prompt_ids("w3 w2 w4 w6 w7") == [1, 3, 2, 4, 6, 7]
    assert lm.prompt_ids("w3") == [1, 3]
