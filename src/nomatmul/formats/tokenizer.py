"""Loading a model's tokenizer: `tokenizer.json`, or a SentencePiece `tokenizer.model` converted.

`tokenizers` is imported when a tokenizer is asked for, so that the other contracts stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul.formats.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


def find_tokenizer_file(directory: str | Path) -> Path | None:
    """Return the directory's tokenizer.json, else its tokenizer.model, else None."""
    for name in (JSON_FILE, SENTENCEPIECE_FILE):
        if (Path(directory) / name).exists():
            return Path(directory) / name
    return None


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model directory, or from a tokenizer.json or .model file.

    `vocab_size` is the model's; a tokenizer that can produce ids beyond it is refused.
    Raises FormatError, in one line, when there is none or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer_file(path)
        if found is None:
            raise FormatError(
                f"{path} has no {JSON_FILE}; copy the model's tokenizer.json (or a SentencePiece"
                f" {SENTENCEPIECE_FILE}) into it"
            )
        path = found
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    tokenizer = tokenizer_from_bytes(data, path)
    if vocab_size is not None:
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise FormatError(
                f"{path} has token ids up to {highest}, but the model's vocabulary is {vocab_size}"
            )
    return tokenizer


def tokenizer_from_bytes(data: bytes, path: Path) -> Tokenizer:
    """Build a tokenizer from the bytes of a .json or .model file; `path` names it in errors."""
    from tokenizers import Tokenizer

    if path.suffix == ".model":
        from nomatmul.formats.sentencepiece import tokenizer_from_sentencepiece

        return tokenizer_from_sentencepiece(data, path)
    try:
        return Tokenizer.from_buffer(data)
    except BaseException as error:  # the Rust library panics on some damage: no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is no tokenizer: {reason}") from None
