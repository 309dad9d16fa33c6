"""Loading and saving a model's `tokenizer.json`: the one place where a tokenizer is opened.

The rule for training, scoring, generation, chat and embedding alike: **text that spells a special
token is ordinary text**. Nobody can type a control token into a model. Filling in masks is the one
exception, because the mask must be spelt: such a tokenizer is opened with `special_in_text`. The
two meanings are two tokenizers; nobody switches one that others may be using.

`tokenizers` is imported when a tokenizer is asked for, so that the other contracts stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.tokenizer_config import CONFIG_FILE, tokenizer_config_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


def find_tokenizer_file(directory: str | Path) -> Path | None:
    """Return the directory's tokenizer.json, or None."""
    path = Path(directory) / JSON_FILE
    return path if path.exists() else None


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, *, special_in_text: bool = False
) -> Tokenizer:
    """Load the tokenizer of a model directory, or from a tokenizer.json file.

    `vocab_size` is the model's; a tokenizer that can produce ids beyond it is refused.
    special_in_text: text that spells a special token becomes that token (only to fill in masks).
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
    tokenizer = tokenizer_from_bytes(data, path, special_in_text=special_in_text)
    if vocab_size is not None:
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise FormatError(
                f"{path} has token ids up to {highest}, but the model's vocabulary is {vocab_size}"
            )
    return tokenizer


def tokenizer_from_bytes(data: bytes, path: object, *, special_in_text: bool = False) -> Tokenizer:
    """Build a tokenizer from the bytes of tokenizer.json; `path` names it in errors.

    special_in_text: see `load_tokenizer`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except BaseException as error:  # the Rust library panics on some damage: no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "" if data[:1] == b"{" else " (a SentencePiece model must be converted first)"
        raise FormatError(f"{path} is no tokenizer.json{hint}: {reason}") from None
    prepare(tokenizer, special_in_text=special_in_text)
    return tokenizer


def prepare(tokenizer: Tokenizer, *, special_in_text: bool = False) -> None:
    """Set a new tokenizer's switches: the package's rule, no padding, no truncation.

    Padding and truncation that a file switches on would change texts unseen.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not special_in_text


def save_tokenizer(
    tokenizer: Tokenizer, directory: Path, config: ModelConfig, source: Path | None = None
) -> None:
    """Write tokenizer.json and the tokenizer_config.json of a model; source as `tokenizer_config`.

    Raises OSError.
    """
    # Names are read first: the source may be the directory itself.
    names = tokenizer_config_bytes(tokenizer, config, source)
    write_file(directory / JSON_FILE, tokenizer.to_str().encode("utf-8"))
    write_file(directory / CONFIG_FILE, names)


def _missing(directory: Path) -> str:
    if (directory / SENTENCEPIECE_FILE).exists():
        return (
            f"{directory} has a SentencePiece {SENTENCEPIECE_FILE} but no {JSON_FILE};"
            " `nomatmul pack` converts it"
        )
    return f"{directory} has no {JSON_FILE}; copy the model's tokenizer.json into it"
