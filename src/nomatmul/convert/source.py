"""Where a user's path leads: the checkpoint in a run directory, and the tokenizer beside it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import TOKENIZER_FILE
from nomatmul.formats.runs import find_checkpoint
from nomatmul.formats.tokenizer import load_tokenizer
from nomatmul.formats.tokenizer_config import CONFIG_FILE

__all__ = ["SENTENCEPIECE_FILE", "find_checkpoint", "prepare_tokenizer"]

SENTENCEPIECE_FILE = "tokenizer.model"


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
            if (directory / CONFIG_FILE).is_file():  # names the special tokens
                shutil.copy(directory / CONFIG_FILE, scratch)
            convert_tokenizer(sentencepiece).save(str(path))
            load_tokenizer(path, config.vocab_size)
            yield path, "converted"
    else:
        yield None, "none"
