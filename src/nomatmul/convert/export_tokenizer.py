"""The tokenizer of a model as a GGUF file has it: the reverse of `gguf_tokenizer`.

Two kinds: byte-level BPE, whose cuts llama.cpp knows by name, and SentencePiece's BPE, whose merges
become scores. What is written is read again, and must give the same ids for texts of all kinds.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.check_text import DEFAULT_TEXT
from nomatmul.engine.text import byte_alphabet
from nomatmul.formats.chat_template import find_template
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_pretokenizers import (
    DEFAULT,
    GPT2,
    PRE_TOKENIZERS,
    SINGLE_DIGITS,
)
from nomatmul.formats.published.gguf_tokenizer import tokenizer_files
from nomatmul.formats.published.gguf_tokens import (
    BYTE,
    CONTROL,
    END_NAMES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from nomatmul.formats.sentencepiece import SPACE
from nomatmul.formats.tokenizer import JSON_FILE, load_tokenizer, tokenizer_from_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Cuts, digits, cases, white space, other scripts, and what byte-level vocabularies cut in bytes.
PROBES = (
    DEFAULT_TEXT,
    "Hello, world! It's 12345 o'clock; they'LL come, WE'VE said so: 3.14159, 0xFF, 50 %.",
    "  two  spaces,\ttab\n\n\nnew lines \r\n and more   \n  ",
    "def f(x):\n    return x**2 # comment\n\tif a<=b and c!=d: pass\n",
    "CamelCaseWord XMLHttpRequest snake_case «quotes» – “curly” … ¿qué? $5 +1 =2",
    "Größe, naïve café, Ελληνικά, русский, 中文字符, 日本語, हिन्दी, عربى, \U0001f600",
    "a",
    " ",
)
_SEQUENCE, _METASPACE = "Sequence", "Metaspace"
_UNMERGED = -1e6  # the score of a token that no merge makes: no one reads it


def vocabulary_metadata(
    path: Path | None, config: ModelConfig, start: int | None, name: object
) -> dict[str, Any]:
    """{key: value} of a model's tokenizer.json and of what lies beside it; path None: none.

    config: the model's; start: the token that its texts begin with. name: what to call the model.
    Raises ValueError, by name, for a tokenizer that GGUF has no words for; warns of what is lost.
    """
    if path is None:
        warnings.warn(f"{name} has no tokenizer: the file will have none", stacklevel=2)
        return {"tokenizer.ggml.model": "no_vocab"}
    tokenizer = load_tokenizer(path, config.vocab_size)
    document = json.loads(tokenizer.to_str())
    if document["model"].get("type") != "BPE":
        raise ValueError(
            f"{path} is {document['model'].get('type')}; a GGUF file has BPE, byte-level or of"
            " SentencePiece"
        )
    names, types = _tokens(tokenizer, config.vocab_size)
    found = _kind(document, names, types, path)
    found["tokenizer.ggml.tokens"] = names
    found["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    found |= _special(config, start, document, names)
    if (template := find_template(path.parent)) is not None:
        found["tokenizer.chat_template"] = template
    metaspace = (document["pre_tokenizer"] or {}).get("type") == _METASPACE
    texts = [text for text in PROBES if not (metaspace and text.startswith(" "))]
    _compare(tokenizer, found, texts, path)
    return found


def _tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """(names, types) of all ids; those of no token are filled, as llama.cpp's converter does."""
    names = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        names[i], types[i] = token, NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    return names, types


def _kind(document: JsonObject, names: list[str], types: list[int], path: Path) -> dict[str, Any]:
    patterns = _patterns(document["pre_tokenizer"])
    if patterns is not None:
        return _byte_level(document, patterns, path)
    return _sentencepiece(document, names, types, path)


def _patterns(cuts: JsonObject | None) -> tuple[str, ...] | None:
    """The patterns by which byte-level BPE cuts a text; None for what is no byte-level BPE."""
    parts = cuts["pretokenizers"] if cuts and cuts["type"] == _SEQUENCE else [cuts] if cuts else []
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    found = [_pattern(part) for part in parts[:-1]]
    if any(pattern is None for pattern in found):
        return None
    whole = tuple(pattern for pattern in found if pattern is not None)
    return (*whole, GPT2) if parts[-1].get("use_regex", True) else whole


def _pattern(part: JsonObject) -> str | None:
    if part["type"] == "Digits" and part["individual_digits"]:
        return r"\p{N}"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        pattern = part["pattern"].get("Regex")
        return None if pattern is None else str(pattern)
    return None


def _byte_level(document: JsonObject, patterns: tuple[str, ...], path: Path) -> dict[str, Any]:
    _check_normaliser(document["normalizer"], path)
    model = document["model"]
    merges = _pairs(model["merges"])
    if patterns == (SINGLE_DIGITS,) and not _joins_digits(merges):
        patterns = (GPT2,)  # cuts numbers less, but nothing merges what it leaves together
    whole = bool(model.get("ignore_merges"))
    name = next(
        (
            name
            for name, kind in PRE_TOKENIZERS.items()
            if kind.patterns == patterns and kind.ignore_merges == whole
        ),
        None,
    )
    if name is None:
        raise ValueError(
            f"{path} cuts texts by {' then '.join(map(repr, patterns))}, for which llama.cpp has no"
            " name (--to unpacked keeps tokenizer.json)"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }


def _check_normaliser(normaliser: JsonObject | None, path: Path) -> None:
    if normaliser is None:
        return
    if normaliser["type"] != "NFC":
        raise ValueError(
            f"{path} changes texts before it cuts them ({normaliser['type']}), which llama.cpp does"
            " not (--to unpacked keeps tokenizer.json)"
        )
    warnings.warn(
        f"{path} composes accents (NFC); llama.cpp does not: texts with loose accents differ",
        stacklevel=5,
    )


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which has pairs or, in older files, lines."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges)
    return [(left, right) for left, right in pairs]


def _joins_digits(merges: list[tuple[str, str]]) -> bool:
    """Whether a merge of a byte-level vocabulary makes a token with a digit beside another."""
    letters = byte_alphabet()
    for left, right in merges:
        spelt = bytes(letters[letter] for letter in left + right)
        digits = [unicodedata.category(c).startswith("N") for c in spelt.decode("utf-8", "ignore")]
        if any(a and b for a, b in itertools.pairwise(digits)):
            return True
    return False


def _sentencepiece(
    document: JsonObject, names: list[str], types: list[int], path: Path
) -> dict[str, Any]:
    prefix = _space_prefix(document, path)
    model = document["model"]
    unknown = model.get("unk_token")
    for i, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types[i] = BYTE
        if name == unknown:
            types[i] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": DEFAULT,
        "tokenizer.ggml.scores": _scores(_pairs(model["merges"]), names, path),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _scores(pairs: list[tuple[str, str]], names: list[str], path: Path) -> NDArray[np.float32]:
    """A score for each token, by which its merges get the ranks that they have.

    Merges that make one token lie together, or among those of tokens of the same score: of these
    the longer left parts come first, then the longer right ones.
    """
    last = {left + right: i for i, (left, right) in enumerate(pairs)}
    ids = {name: i for i, name in enumerate(names)}
    scores = np.full(len(names), _UNMERGED, np.float32)
    until, score = -1, 1
    before = (-1, 0, 0)
    for i, (left, right) in enumerate(pairs):
        score -= i > until
        until = max(until, last[left + right])
        key = (-score, -len(left), -len(right))
        if key < before:
            raise ValueError(
                f"{path} merges {left!r} and {right!r} too late for one score a token, which is"
                " what a GGUF file has (--to unpacked keeps tokenizer.json)"
            )
        before = key
        scores[ids[left + right]] = score
    return scores


def _space_prefix(document: JsonObject, path: Path) -> bool:
    """Whether a text gets a space in front. Raises ValueError for what is not SentencePiece's."""
    cuts, normaliser = document["pre_tokenizer"], document["normalizer"]
    if cuts is not None and normaliser is None and cuts["type"] == _METASPACE:
        if cuts["replacement"] == SPACE and not cuts.get("split", True):
            prefix = bool(cuts.get("prepend_scheme") != "never")
            if prefix:
                warnings.warn(
                    f"{path} puts no space before a text that begins with one; llama.cpp does",
                    stacklevel=6,
                )
            return prefix
    elif cuts is None and normaliser is not None:
        steps = normaliser["normalizers"] if normaliser["type"] == _SEQUENCE else [normaliser]
        plain = [{k: v for k, v in step.items() if k in ("type", "prepend")} for step in steps]
        last = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        if plain[:-1] in ([], [{"type": "Prepend", "prepend": SPACE}]) and steps[-1] == last:
            return len(plain) == 2
    words = " and ".join(part["type"] for part in (normaliser, cuts) if part) or "nothing"
    raise ValueError(
        f"{path} prepares texts by {words}, which is neither byte-level BPE's way nor"
        " SentencePiece's (--to unpacked keeps tokenizer.json)"
    )


def _special(
    config: ModelConfig, start: int | None, document: JsonObject, names: list[str]
) -> dict[str, Any]:
    ends = config.end_token_ids
    ids: dict[str, int | None] = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    if not ends:
        warnings.warn(
            "the model has no end token; llama.cpp then takes one of its own", stacklevel=3
        )
    lost = [names[i] for i in ends[3:] if names[i] not in END_NAMES]
    if lost:
        warnings.warn(f"llama.cpp will not end at {', '.join(map(repr, lost))}", stacklevel=3)
    bos = config.bos_token_id if start is None else start
    unknown = document["model"].get("unk_token")
    ids |= {"bos": bos, "padding": config.pad_token_id}
    ids["unknown"] = names.index(unknown) if unknown in names else None
    return {
        **{f"tokenizer.ggml.{k}_token_id": np.uint32(i) for k, i in ids.items() if i is not None},
        "tokenizer.ggml.add_bos_token": start is not None,
        "tokenizer.ggml.add_eos_token": False,
    }


def _compare(
    tokenizer: Tokenizer, metadata: dict[str, Any], texts: Sequence[str], path: Path
) -> None:
    """Raise ValueError where the written tokenizer would give other ids than the model's own."""
    read = {k: v.item() if isinstance(v, np.generic) else v for k, v in metadata.items()}
    written = tokenizer_from_bytes(tokenizer_files(read, path)[JSON_FILE], path)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found = written.encode(text, add_special_tokens=False).ids
        if ids != found:
            pairs = itertools.zip_longest(ids, found)
            at = next(i for i, (own, other) in enumerate(pairs) if own != other)
            raise ValueError(
                f"{path} gives other ids than a GGUF file's tokenizer would: of {text[:40]!r}, from"
                f" token {at} on (--to unpacked keeps tokenizer.json)"
            )
