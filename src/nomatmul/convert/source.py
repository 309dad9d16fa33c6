"""Where a user's path leads: the checkpoint in a run directory, and the tokenizer beside it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.packed_layout import TOKENIZER_FILE
from nomatmul.formats.tokenizer import load_tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` means.

    A directory with a config.json is one itself; in the directory of a training run the finished
    model is taken, else the latest checkpoint. Raises FormatError when there is none.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    if not path.is_dir():
        raise FormatError(f"{path} is a file; a model is a directory with a config.json")
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    found = sorted(path.glob("checkpoints/step-*/config.json"))
    if not found:
        raise FormatError(f"{path} holds no model: it has no config.json and no checkpoints/")
    with contextlib.suppress(OSError, ValueError):  # the newest is a good answer without it too
        latest = path / "checkpoints" / (path / "checkpoints" / "latest").read_text("utf-8").strip()
        if latest / "config.json" in found:
            return latest
    return found[-1].parent


@contextlib.contextmanager
def prepare_tokenizer(directory: Path, config: ModelConfig) -> Iterator[tuple[Path | None, str]]:
    """(path of a tokenizer.json, how it came): "copied", "converted" from tokenizer.model, "none".

    Raises ValueError when the tokenizer is damaged or has more tokens than the model.
    """
    plain, sentencepiece = directory / TOKENIZER_FILE, directory / SENTENCEPIECE_FILE
    if plain.is_file():
        load_tokenizer(plain, config.vocab_size)
        yield plain, "copied"
    elif sentencepiece.is_file():
        from nomatmul.convert.sentencepiece import convert_tokenizer

        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / TOKENIZER_FILE
            convert_tokenizer(sentencepiece).save(str(path))
            load_tokenizer(path, config.vocab_size)
            yield path, "converted"
    else:
        yield None, "none"
