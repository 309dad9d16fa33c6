"""The tokenizer of a directory that has no tokenizer.json, and whether two of them are one.

A directory with a SentencePiece file may add tokens of its own: added_tokens.json says their ids,
special_tokens_map.json and tokenizer_config.json which of them are special.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.convert.sentencepiece import NORMAL, convert_tokenizer, read_vocabulary
from nomatmul.engine.text import byte_alphabet
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, tokenizer_from_bytes
from nomatmul.formats.tokenizer_config import CONFIG_FILE, SPECIAL_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ADDED_FILE = "added_tokens.json"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?")


def convert_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a directory with a SentencePiece file and perhaps added tokens.

    Raises ValueError when a file is damaged or puts a token where it cannot be.
    """
    from tokenizers import AddedToken

    tokenizer: Tokenizer = convert_tokenizer(
        directory / SENTENCEPIECE_FILE,
        add_dummy_prefix=_config(directory).get("add_prefix_space") is not False,
    )
    added = _added_tokens(directory)
    special = _special_tokens(directory)
    for token, index in sorted(added.items(), key=lambda pair: pair[1]):
        flags = AddedToken(token, normalized=False, special=token in special)
        if token in special:
            tokenizer.add_special_tokens([flags])
        else:
            tokenizer.add_tokens([flags])
        if tokenizer.token_to_id(token) != index:
            raise FormatError(
                f"{directory}: the added token {token!r} has id {index}, but its place in the"
                f" vocabulary is {tokenizer.token_to_id(token)}"
            )
    return tokenizer


def _added_tokens(directory: Path) -> dict[str, int]:
    """{token: id} of added_tokens.json and of the decoder table in tokenizer_config.json."""
    path = directory / ADDED_FILE
    found = read_json_object(path) if path.is_file() else {}
    for token, index in found.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise FormatError(f"{path}: the id of {token!r} is {index!r}, not a whole number")
    for key, entry in _decoder(directory).items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not key.isdecimal():
            raise FormatError(f"{directory / CONFIG_FILE}: added token {key!r} is {entry!r}")
        if found.setdefault(name, int(key)) != int(key):
            raise FormatError(
                f"{directory}: {ADDED_FILE} and {CONFIG_FILE} disagree about the id of {name!r}:"
                f" {found[name]} and {key}"
            )
    return found


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    return read_json_object(path) if path.is_file() else {}


def _decoder(directory: Path) -> dict[str, Any]:
    table = _config(directory).get("added_tokens_decoder")
    return table if isinstance(table, dict) else {}


def _special_tokens(directory: Path) -> set[str]:
    found = {
        str(entry["content"]) for entry in _decoder(directory).values() if entry.get("special")
    }
    path = directory / SPECIAL_FILE
    values = read_json_object(path).values() if path.is_file() else ()
    for value in itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values):
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            found.add(name)
    return found


def check_agreement(tokenizer: Tokenizer, name: str, path: Path) -> None:
    """Raise FormatError where another tokenizer file has other tokens than `tokenizer`.

    name: what to call the first one. path: tokenizer.json, or a tokenizer.model (SentencePiece's,
    or tiktoken's lines). Control tokens may have other names, and the first one may have more.
    """
    for index, token in _ordinary_tokens(path):
        own = tokenizer.id_to_token(index)
        if own != token:
            raise FormatError(
                f"two tokenizers disagree: token {index} is {own!r} in {name} and {token!r} in"
                f" {path}; remove the file that is wrong"
            )


def _ordinary_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """(id, token) of a tokenizer file's vocabulary, without control tokens."""
    data = path.read_bytes()
    if path.name == JSON_FILE:
        other = tokenizer_from_bytes(data, path)
        special = {i for i, token in other.get_added_tokens_decoder().items() if token.special}
        yield from ((i, t) for t, i in other.get_vocab().items() if i not in special)
    elif _TIKTOKEN_LINE.fullmatch(data[:200].split(b"\n", 1)[0]):
        letters = {byte: letter for letter, byte in byte_alphabet().items()}
        try:
            pairs = [line.split() for line in data.splitlines() if line]
            for token, rank in pairs:
                spelt = base64.b64decode(token, validate=True)
                yield int(rank), "".join(letters[byte] for byte in spelt)
        except (ValueError, binascii.Error) as error:
            raise FormatError(f"{path} is damaged: {error}") from None
    else:
        pieces = read_vocabulary(path, any_kind=True).pieces
        yield from ((i, piece) for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL)
