"""The tokenizer in a GGUF file's metadata, as the files that a Hugging Face model has.

Two kinds: byte-level BPE ("gpt2") with a pre-tokenizer by name, and SentencePiece ("llama"), whose
pieces are merged by score. The ids of a text are llama.cpp's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nomatmul.formats.chat_template import TEMPLATE_FILE
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_keys import Keys
from nomatmul.formats.published.gguf_pretokenizers import (
    DEFAULT,
    LLAMA3,
    PRE_TOKENIZERS,
    PreTokenizer,
)
from nomatmul.formats.published.gguf_tokens import (
    BYTE,
    CONTROL,
    MODEL,
    SENTENCEPIECE,
    UNKNOWN,
    USER_DEFINED,
    Tokens,
    read_tokens,
    special_id,
)
from nomatmul.formats.sentencepiece import Vocabulary, build_tokenizer
from nomatmul.formats.tokenizer import JSON_FILE, tokenizer_from_bytes
from nomatmul.formats.tokenizer_config import CONFIG_FILE

_TEMPLATE = "tokenizer.chat_template"
_BYTE_LEVEL = "gpt2"
_PREFIX = "tokenizer.ggml."
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
# Keys that say nothing of how a text is cut, beside those that end in `_token_id`.
_HARMLESS = ("token_type_count", "suppress_tokens")
# Options that are computed only where they are off, as they are by default.
_ONLY_FALSE = ("remove_extra_whitespaces", "add_sep_token")


def tokenizer_files(
    metadata: Mapping[str, Any], path: object = "the GGUF file"
) -> dict[str, bytes]:
    """{name: content} of tokenizer.json, tokenizer_config.json and, where the metadata hold one,
    chat_template.jinja; {} where they hold no tokenizer.

    path: what to call the file. Raises FormatError for a kind, pre-tokenizer or option that is not
    understood, by name, and for a damaged vocabulary. Warns where no pre-tokenizer is named.
    """
    keys = Keys(metadata, path)
    model = keys.text(MODEL, "none")
    if model in ("none", "no_vocab"):
        return {}
    tokens = read_tokens(keys)
    if model == SENTENCEPIECE:
        tokenizer, add_bos = _checked(keys, lambda: _sentencepiece(keys, tokens)), True
    elif model == _BYTE_LEVEL:
        kind = _pre_tokenizer(keys, tokens)
        tokenizer, add_bos = _checked(keys, lambda: _byte_level(keys, tokens, kind)), kind.add_bos
    else:
        raise FormatError(
            f"{path} has a tokenizer of the kind {model!r}; it must be {_BYTE_LEVEL!r} or"
            f" {SENTENCEPIECE!r}"
        )
    found = _files(keys, tokens, tokenizer, add_bos)
    _refuse_others(keys)
    return found


def _checked(keys: Keys, build: Callable[[], Any]) -> Any:
    """What `build` makes with the `tokenizers` library, whose own errors have no common base."""
    try:
        return build()
    except FormatError:
        raise
    except BaseException as error:  # the Rust library panics on some damage: no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{keys.path}: its vocabulary makes no tokenizer: {reason}") from None


def _sentencepiece(keys: Keys, tokens: Tokens) -> Any:
    scores = keys.array(f"{_PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens.names):
        found = "none" if scores is None else len(scores)
        raise FormatError(f"{keys.path} has {len(tokens.names)} tokens, but {found} scores")
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise FormatError(f"{keys.path}: {_PREFIX}scores must be finite numbers")
    # As llama.cpp, whose converter writes "default" here; merges, which older files have, say what
    # the scores say.
    if (name := keys.text(f"{_PREFIX}pre", DEFAULT)) != DEFAULT:
        raise FormatError(f"{keys.path}: {_PREFIX}pre is {name!r} beside SentencePiece")
    keys.array(f"{_PREFIX}merges")
    vocabulary = Vocabulary(
        list(zip(tokens.names, scores.tolist(), tokens.types, strict=True)),
        byte_fallback=BYTE in tokens.types,
        add_dummy_prefix=keys.flag(f"{_PREFIX}add_space_prefix", True),
    )
    return build_tokenizer(vocabulary, keys.path)


def _pre_tokenizer(keys: Keys, tokens: Tokens) -> PreTokenizer:
    """The pre-tokenizer that the file names; where it names none, llama.cpp's "default".

    BitNet-2B-4T's own files name none: Llama 3's vocabulary is cut as Llama 3 does.
    """
    name = keys.text(f"{_PREFIX}pre", "")
    if not name:
        name = LLAMA3 if "<|begin_of_text|>" in tokens.names else DEFAULT
        warnings.warn(
            f"{keys.path} names no pre-tokenizer ({_PREFIX}pre): taking {name!r}", stacklevel=1
        )
    if name not in PRE_TOKENIZERS:
        raise FormatError(f"{keys.path}: the pre-tokenizer {name!r} is not known")
    if keys.flag(f"{_PREFIX}add_space_prefix", False):
        raise FormatError(f"{keys.path}: {_PREFIX}add_space_prefix is true beside byte-level BPE")
    return PRE_TOKENIZERS[name]


def _byte_level(keys: Keys, tokens: Tokens, kind: PreTokenizer) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {name: i for i, name in enumerate(tokens.names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=_merges(keys, ids), ignore_merges=kind.ignore_merges)
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    by_type: dict[int, list[Any]] = {CONTROL: [], UNKNOWN: [], USER_DEFINED: []}
    for name, kind_of_token in zip(tokens.names, tokens.types, strict=True):
        if kind_of_token in by_type:
            special = kind_of_token != USER_DEFINED
            by_type[kind_of_token].append(AddedToken(name, normalized=False, special=special))
    tokenizer.add_special_tokens([*by_type[CONTROL], *by_type[UNKNOWN]])
    tokenizer.add_tokens(by_type[USER_DEFINED])
    return tokenizer


def _merges(keys: Keys, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that are merged, in order; both and what they make are tokens."""
    lines = keys.array(f"{_PREFIX}merges")
    if not isinstance(lines, list):
        raise FormatError(f"{keys.path}: {_PREFIX}merges must be a list of pairs of tokens")
    found = []
    for line in lines:
        at = str(line).find(" ", 1)
        pair = (line[:at], line[at + 1 :]) if at > 0 else ("", "")
        if not (pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids):
            raise FormatError(f"{keys.path}: the merge {line!r} is not of tokens that make a token")
        found.append(pair)
    return found


def _refuse_others(keys: Keys) -> None:
    """Refuse options of a tokenizer that are not understood."""
    for name in _ONLY_FALSE:
        if keys.flag(_PREFIX + name, False):
            raise FormatError(f"{keys.path}: {_PREFIX}{name} is true, which is not supported")
    for key in sorted(keys.unasked(_PREFIX)):
        if not key.endswith("_token_id") and key.removeprefix(_PREFIX) not in _HARMLESS:
            raise FormatError(f"{keys.path}: unknown option {key!r} of the tokenizer")


def _files(keys: Keys, tokens: Tokens, tokenizer: Any, add_bos: bool) -> dict[str, bytes]:
    count = len(tokens.names)
    ids = {name: special_id(keys, name, count) for name in _SPECIAL}
    before = _added(keys, "bos", ids["bos"], add_bos)
    behind = _added(keys, "eos", ids["eos"], False)
    document = json.loads(tokenizer.to_str())
    document["post_processor"] = around_texts(before, behind, dict(enumerate(tokens.names)))
    config: JsonObject = {
        **{ours: tokens.names[i] for k, ours in _SPECIAL.items() if (i := ids[k]) is not None},
        "add_bos_token": bool(before),
        "add_eos_token": bool(behind),
    }
    found = {
        JSON_FILE: json.dumps(document, ensure_ascii=False).encode("utf-8"),
        CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
    }
    tokenizer_from_bytes(found[JSON_FILE], keys.path)
    template = keys.text(_TEMPLATE, "")
    return {**found, TEMPLATE_FILE: template.encode("utf-8")} if template else found


def _added(keys: Keys, name: str, token: int | None, default: bool) -> list[int]:
    """The token that a text gets at an end, or none."""
    key = f"{_PREFIX}add_{name}_token"
    if keys.flag(key, default) and token is None and keys.get(key) is not None:
        raise FormatError(f"{keys.path}: {key} is true, but the file names no such token")
    return [] if token is None or not keys.flag(key, default) else [token]


def around_texts(
    before: list[int], behind: list[int], names: Mapping[int, str]
) -> JsonObject | None:
    """The post-processor of a tokenizer.json that puts tokens, by their ids, before and behind a
    text; None for none."""
    if not before and not behind:
        return None

    def piece(i: int) -> JsonObject:
        return {"SpecialToken": {"id": names[i], "type_id": 0}}

    def text(name: str) -> list[JsonObject]:
        middle: JsonObject = {"Sequence": {"id": name, "type_id": 0}}
        return [*map(piece, before), middle, *map(piece, behind)]

    used = {i: names[i] for i in (*before, *behind)}
    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in used.items()
        },
    }
