"""Special tokens that a GGUF file's metadata name: ids, and the tokens that end a text."""

from __future__ import annotations

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_keys import Keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
# Tokens that end a turn or a text wherever they are control tokens, as llama.cpp takes them.
_END_NAMES = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)


def token_ids(keys: Keys, vocab_size: int) -> JsonObject:
    """The `bos_token_id`, `eos_token_id` (one or a list) and `pad_token_id` of a config.json.

    Raises FormatError for an id that the vocabulary does not have.
    """
    ends = [special_id(keys, name, vocab_size) for name in ("eos", "eot", "eom")]
    ends += _named_ends(keys)
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": special_id(keys, "bos", vocab_size),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
        "pad_token_id": special_id(keys, "padding", vocab_size),
    }


def special_id(keys: Keys, name: str, vocab_size: int) -> int | None:
    """The id that the metadata give for "bos", "eos", ...; None where they give none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = keys.get(key)
    if value is None or value == 0xFFFFFFFF:  # llama.cpp's -1
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise FormatError(f"{keys.path}: {key} is {value!r}; the vocabulary has {vocab_size}")
    return value


def _named_ends(keys: Keys) -> list[int]:
    tokens, types = keys.array(TOKENS), keys.array(TYPES)
    if tokens is None or types is None or len(types) != len(tokens):
        return []  # the tokenizer's reader says what is wrong
    return [
        i
        for i, token in enumerate(tokens)
        if token in _END_NAMES and types[i] in (CONTROL, USER_DEFINED)
    ]
