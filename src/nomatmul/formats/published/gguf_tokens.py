"""The tokens that a GGUF file's metadata list, and which of them are special."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_keys import Keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL, SENTENCEPIECE = "tokenizer.ggml.model", "llama"
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_NONE = 0xFFFFFFFF  # llama.cpp's -1
# Tokens that end a turn or a text wherever a vocabulary has them: llama.cpp goes by these names,
# whatever the file says of their type.
END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "</s>", "<eos>"),
    )
)
# llama.cpp's ids where a SentencePiece vocabulary names none.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


@dataclass(frozen=True)
class Tokens:
    """Tokens and their types in id order: at least one, and no two are the same."""

    names: list[str]
    types: list[int]


def read_tokens(keys: Keys) -> Tokens:
    """Read the list of tokens. Raises FormatError for one that is absent or malformed."""
    names, types = keys.array(_TOKENS), keys.array(_TYPES)
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{keys.path}: {_TOKENS} must be a list of tokens")
    names = [name or f"[EMPTY_{i}]" for i, name in enumerate(names)]  # as llama.cpp calls them
    if len(set(names)) < len(names):
        first: dict[str, int] = {}
        for i, name in enumerate(names):
            if first.setdefault(name, i) != i:
                raise FormatError(f"{keys.path}: tokens {first[name]} and {i} are both {name!r}")
    if types is None:
        types = np.full(len(names), NORMAL)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        raise FormatError(f"{keys.path}: {_TYPES} must be a list of whole numbers")
    if len(types) != len(names):
        raise FormatError(f"{keys.path} has {len(names)} tokens and {len(types)} types of tokens")
    if types.min() < 0 or types.max() > BYTE:
        worst = types.max() if types.max() > BYTE else types.min()
        raise FormatError(f"{keys.path}: {_TYPES} has the unknown type {worst}")
    kinds = [
        CONTROL if name in END_NAMES else kind or NORMAL
        for name, kind in zip(names, types.tolist(), strict=True)
    ]
    return Tokens(names, kinds)


def special_id(keys: Keys, name: str, count: int) -> int | None:
    """The id of "bos", "eos", "unknown", ...; None where there is none.

    count: ids are below it. Raises FormatError for one that is not.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = keys.get(key)
    if value is None and keys.get(MODEL) == SENTENCEPIECE:
        value = _SENTENCEPIECE_IDS.get(name)
    if value is None or value == _NONE:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise FormatError(f"{keys.path}: {key} is {value!r}; the vocabulary has {count}")
    return value


def token_ids(keys: Keys, vocab_size: int) -> JsonObject:
    """The `bos_token_id`, `eos_token_id` (one or a list) and `pad_token_id` of a config.json.

    Raises FormatError for an id that the vocabulary does not have.
    """
    ends = [special_id(keys, name, vocab_size) for name in ("eos", "eot", "eom")]
    if keys.array(_TOKENS) is not None:
        names = read_tokens(keys).names
        if len(names) > vocab_size:
            raise FormatError(
                f"{keys.path} has {len(names)} tokens, but the model's vocabulary is {vocab_size}"
            )
        ends += [i for i, name in enumerate(names) if name in END_NAMES]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": special_id(keys, "bos", vocab_size),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
        "pad_token_id": special_id(keys, "padding", vocab_size),
    }
