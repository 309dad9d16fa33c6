"""Where a user's path leads: a checkpoint in a run directory or on the Hub, and its tokenizer."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from nomatmul.convert.tokenizers import check_agreement, convert_directory
from nomatmul.formats import runs
from nomatmul.formats.chat_template import TEMPLATE_FILE, check_template
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.hub import local_path
from nomatmul.formats.packed.layout import TOKENIZER_FILE
from nomatmul.formats.prompt_start import with_prompt_start
from nomatmul.formats.published.gguf_tokenizer import tokenizer_files
from nomatmul.formats.tokenizer import SENTENCEPIECE_FILE, load_tokenizer
from nomatmul.formats.tokenizer_config import CONFIG_FILE, SPECIAL_FILE

__all__ = ["SENTENCEPIECE_FILE", "find_checkpoint", "prepare_tokenizer", "with_prompt_start"]

# What lies beside a tokenizer and goes with it: names of special tokens, how to chat and to sample.
_BESIDE = (CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE, GENERATION_FILE)

# Forms of a tokenizer that only its class in transformers understands.
_UNREAD = ("vocab.json", "vocab.txt", "spiece.model", "qwen.tiktoken")


def find_checkpoint(path: Path) -> Path:
    """As `formats.runs.find_checkpoint`; hf:owner/name[@revision] is downloaded first."""
    return runs.find_checkpoint(local_path(path))


@contextlib.contextmanager
def prepare_tokenizer(
    directory: Path, config: ModelConfig, files: Mapping[str, bytes] | None = None
) -> Iterator[tuple[Path | None, str]]:
    """(path of a tokenizer.json, how it came): "copied", "converted" from tokenizer.model, "gguf",
    or "none". What belongs to it (see `_BESIDE`) lies in the same directory.

    files: {name: content} of a tokenizer that the weights' own file holds (GGUF); it is taken, and
    what the directory has besides must agree with it.
    Raises ValueError when the tokenizer is damaged, has more tokens than the model, when two of
    them have different vocabularies, or when its chat template is unsafe.
    """
    plain, sentencepiece = directory / TOKENIZER_FILE, directory / SENTENCEPIECE_FILE
    with tempfile.TemporaryDirectory() as name:
        scratch, kind = Path(name), "none"
        if files:
            path, kind = scratch / TOKENIZER_FILE, "gguf"
            _copy_beside(directory, scratch)
            for file, content in files.items():
                (scratch / file).write_bytes(content)
        elif plain.is_file():
            path, kind = plain, "copied"
        elif sentencepiece.is_file():
            path, kind = scratch / TOKENIZER_FILE, "converted"
            _copy_beside(directory, scratch)
            convert_directory(directory).save(str(path))
        if kind == "none":
            _warn_unread(directory)
            yield None, kind
            return
        tokenizer = load_tokenizer(path, config.vocab_size)
        others = {"gguf": (plain, sentencepiece), "copied": (sentencepiece,)}.get(kind, ())
        for other in others:
            if other.is_file():
                check_agreement(tokenizer, "the GGUF's own" if files else str(path), other)
        check_template(path.parent, directory)
        yield path, kind


def source_tokenizer(
    checkpoint: Checkpoint, source: Path
) -> AbstractContextManager[tuple[Path | None, str]]:
    """`prepare_tokenizer` of a model: that beside the source, or in the GGUF file that it is."""
    if checkpoint.metadata is None:
        return prepare_tokenizer(source, checkpoint.config)
    files = tokenizer_files(checkpoint.metadata, source)
    return prepare_tokenizer(source.parent, checkpoint.config, files)


def text_config(checkpoint: Checkpoint, path: Path | None, kind: str) -> ModelConfig:
    """The config; that of Llama's shape names a start token only if its texts begin with it."""
    if checkpoint.found is None:
        return checkpoint.config
    return with_prompt_start(checkpoint.config, path, kind)


def _warn_unread(directory: Path) -> None:
    """Say that a tokenizer lies there which is not read."""
    found = [file for file in _UNREAD if (directory / file).is_file()]
    if found:
        warnings.warn(
            f"{directory} has a tokenizer in {found[0]}, which is not read: load it with"
            f" transformers' AutoTokenizer and save it, which writes {TOKENIZER_FILE}",
            stacklevel=3,
        )


def _copy_beside(directory: Path, scratch: Path) -> None:
    for file in _BESIDE:
        if (directory / file).is_file():
            shutil.copy(directory / file, scratch)
