"""Pieces of a stream join to the text of the whole less that of the prompt, for every decoder."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from nomatmul.engine.text import BROKEN, Detokenizer, StopCutter

LETTERS = "abc é漢🦫\n"


def _fallback() -> Tokenizer:
    """SentencePiece's BPE: a space is a letter of its own, unknown letters are bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {piece: 257 + at for at, piece in enumerate(["▁", "a", "b", "c", "▁a", "ab", "▁ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = [("<unk>", -9.0), *((piece, -2.0) for piece in ("▁", "▁a", "b", "c", "a", "▁▁", "bc"))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _wordpiece() -> Tokenizer:
    names = ["[UNK]", "a", "b", "##a", "##b", "##c", "c", ".", "##ab"]
    vocab = {name: at for at, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _words() -> Tokenizer:
    """Without a decoder: words with a space between."""
    vocab = {"a": 0, "b": 1, "ab": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@functools.cache
def made(kind: str) -> Tokenizer:
    return {"fallback": _fallback, "bytes": _bytes, "unigram": _unigram,
            "wordpiece": _wordpiece, "words": _words}[kind]()  # fmt: skip


def encode(kind: str, text: str) -> list[int]:
    return made(kind).encode(text, add_special_tokens=False).ids


def streamed(kind: str, context: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(made(kind), context)
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


KINDS = ("fallback", "bytes", "unigram", "wordpiece", "words")


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(LETTERS + BROKEN, max_size=12), cut=st.integers(0, 40))
@example(text=2 * BROKEN, cut=3)
def test_pieces_join_to_the_whole_less_the_prompt(kind: str, text: str, cut: int) -> None:
    ids = encode(kind, text)
    cut = min(cut, len(ids))
    whole, prompt = made(kind).decode(ids), made(kind).decode(ids[:cut])
    if not whole.startswith(prompt):  # the cut lies inside a character, which then is written whole
        assert kind in ("fallback", "bytes")
        for earlier in range(cut, -1, -1):
            prompt = made(kind).decode(ids[:earlier])
            if whole.startswith(prompt):
                break
    got = streamed(kind, ids[:cut], ids[cut:])
    legal = [whole[len(prompt) :]]
    # a U+FFFD of the text, or a prompt that ends inside one, whose bytes are written singly
    broken = len(prompt) - len(prompt.rstrip(BROKEN))
    legal += [whole[len(prompt) - back :] for back in range(1, min(broken, 3) + 1)]
    assert got in legal


@given(st.lists(st.integers(0, 255), max_size=12), st.integers(0, 12))
def test_any_bytes_come_out_as_their_decoder_writes_them(ids: list[int], cut: int) -> None:
    whole = made("bytes").decode(ids)
    got = streamed("bytes", [], ids)
    assert got == whole or (whole.endswith(BROKEN) and got == whole[:-1])  # unfinished: left out
    pieces = Detokenizer(made("bytes"), [])
    text = "".join(map(pieces.push, ids[:cut]))
    assert whole.startswith(text)


def test_characters_beside_broken_bytes_are_kept() -> None:
    broken = made("fallback").token_to_id("<0xFF>")
    ids = [
        *encode("fallback", "é"),
        broken,
        *encode("fallback", "漢")[1:],
        *encode("fallback", "a"),
    ]
    assert streamed("fallback", [], ids).split() == [f"é{BROKEN}漢", "a"]


def test_nothing_is_held_longer_than_a_character_takes() -> None:
    detokenizer = Detokenizer(made("fallback"), [])
    lengths = [len(detokenizer.push(i)) for i in encode("fallback", "🦫é")[1:]]
    assert lengths == [0, 0, 0, 1, 0, 1]


@given(
    st.text("abcd", max_size=20),
    st.lists(st.text("abcd", min_size=1, max_size=4), max_size=3),
    st.integers(1, 7),
)
def test_where_a_stop_string_cuts_does_not_depend_on_the_pieces(
    text: str, stop: list[str], size: int
) -> None:
    results = []
    for step in (1, size):
        cutter = StopCutter(stop)
        out = "".join(cutter.push(text[at : at + step]) for at in range(0, len(text), step))
        results.append((out if cutter.stopped else out + cutter.finish(), cutter.stopped))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(LETTERS, min_size=20, max_size=60), cut=st.integers(18, 60))
def test_the_end_of_a_long_context_says_as_much_as_all_of_it(
    kind: str, text: str, cut: int
) -> None:
    ids = encode(kind, text)
    cut = min(cut, len(ids))
    short, whole = Detokenizer(made(kind), ids[:cut]), Detokenizer(made(kind), ())
    whole._ids = ids[:cut]
    whole._read = cut - whole._open(whole._decode(ids[:cut]))
    assert [*map(short.push, ids[cut:]), short.finish()] == [
        *map(whole.push, ids[cut:]),
        whole.finish(),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_behind_any_text(kind: str) -> None:
    """What is decoded for it does not grow: behind a long prompt, behind many special tokens."""
    tokenizer = Tokenizer.from_str(made(kind).to_str())
    tokenizer.add_special_tokens(["<|pause|>"])
    pause, letter = tokenizer.token_to_id("<|pause|>"), encode(kind, "a")[-1]
    decoded: list[int] = []

    class Counting:
        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    detokenizer = Detokenizer(Counting(), [letter] * 1000)  # type: ignore[arg-type]
    pieces = [detokenizer.push(token) for token in [letter, *[pause] * 200, letter]]
    assert max(decoded) < 40
    expected = tokenizer.decode([letter] * 1002)[len(tokenizer.decode([letter] * 1000)) :]
    assert "".join(pieces) + detokenizer.finish() == expected


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=6))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(text: str, stop: str) -> None:
    cutter = StopCutter([stop])
    out = cutter.push(text)
    if cutter.stopped:
        assert out == text[: text.index(stop)]
        return
    held = text[len(out) :]
    longest = max(n for n in range(len(stop)) if n == 0 or text.endswith(stop[:n]))
    assert (len(held), text) == (longest, out + held)
