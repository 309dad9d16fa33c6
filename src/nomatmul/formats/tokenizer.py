"""Loading a model's `tokenizer.json`.

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
    """Return the directory's tokenizer.json, or None."""
    path = Path(directory) / JSON_FILE
    return path if path.exists() else None


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model directory, or from a tokenizer.json file.

    `vocab_size` is the model's; a tokenizer that can produce ids beyond it is refused.
    Raises FormatError, in one line, when there is none or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer_file(path)
        if found is None:
            raise FormatError(_missing(path))
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
    """Build a tokenizer from the bytes of tokenizer.json; `path` names it in errors.

    Padding and truncation that the file switches on are off: they would change texts unseen.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except BaseException as error:  # the Rust library panics on some damage: no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is no tokenizer: {reason}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _missing(directory: Path) -> str:
    if (directory / SENTENCEPIECE_FILE).exists():
        return (
            f"{directory} has a SentencePiece {SENTENCEPIECE_FILE} but no {JSON_FILE};"
            " `nomatmul pack` converts it"
        )
    return f"{directory} has no {JSON_FILE}; copy the model's tokenizer.json into it"
