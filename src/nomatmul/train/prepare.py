"""From the user's file names to token streams: checks first, then tokenizer, then shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.formats.atomic import write_file
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.documents import Source, find_sources
from nomatmul.train.files import remove_leftovers, write_json
from nomatmul.train.shards import Progress, build_shards, is_token_directory
from nomatmul.train.tokenizer import (
    fingerprint,
    load_tokenizer,
    mask_id,
    special_ids,
    train_tokenizer,
    train_word_piece,
)
from nomatmul.train.tokens import TokenStream, join_streams, open_stream, token_directory_sha256


@dataclasses.dataclass(frozen=True)
class DataArgs:
    """Where the text comes from; see documents.py for the kinds of sources.

    data and valid may instead name token directories that an earlier run built. tokens: where the
    shards go (shared between runs); None means OUT/tokens.
    """

    data: tuple[str, ...]
    valid: tuple[str, ...] = ()
    tokenizer: str | None = None
    text_field: str = "text"
    document_start: str | None = None
    tokens: str | None = None
    workers: int | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training needs of the data. sha256: of all the tokens, to recognise them on a resume."""

    train: TokenStream
    valid: TokenStream | None
    tokenizer: Tokenizer
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Checked:
    """Inputs that exist and can be opened."""

    directories: list[Path]
    sources: list[Source]
    valid_directories: list[Path]
    valid_sources: list[Source]
    tokenizer: Tokenizer | None


def check_inputs(config: TrainConfig, args: DataArgs) -> _Checked:
    """Find every mistake that needs no work to find. Raises ValueError or OSError."""
    directories, sources = _split(args.data, args)
    if not directories and not sources:
        raise ValueError("no data: name at least one text, JSONL or parquet file")
    valid_directories, valid_sources = _split(args.valid, args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if directories:
        own = load_tokenizer(directories[0])
        if tokenizer is not None and fingerprint(tokenizer) != fingerprint(own):
            raise ValueError(f"{args.tokenizer} is not the tokenizer of {directories[0]}")
        tokenizer = own
    if tokenizer is not None:
        _check_vocabulary(config, tokenizer, args.tokenizer or str(directories[0]))
        special_ids(tokenizer)
        if not config.model.causal:
            mask_id(tokenizer)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"workers {args.workers} must be at least 1")
    return _Checked(directories, sources, valid_directories, valid_sources, tokenizer)


def _split(names: tuple[str, ...], args: DataArgs) -> tuple[list[Path], list[Source]]:
    directories = [Path(name) for name in names if is_token_directory(name)]
    rest = [name for name in names if not is_token_directory(name)]
    if directories and rest:
        raise ValueError(f"{rest[0]} is text and {directories[0]} holds tokens: give one kind")
    return directories, find_sources(rest, args.text_field, args.document_start) if rest else []


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer, name: str) -> None:
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if size > config.model.vocab_size:
        raise ValueError(
            f"{name} has {size} entries, model.vocab_size is {config.model.vocab_size}: "
            f"add --set model.vocab_size={size}"
        )


def prepare(
    config: TrainConfig,
    args: DataArgs,
    out: Path,
    progress: Progress = lambda what, done, of: None,
) -> Prepared:
    """Tokenizer and token streams, built where they are missing. Raises ValueError, OSError."""
    return open_built(config, build(config, args, out, progress))


def build(
    config: TrainConfig,
    args: DataArgs,
    out: Path,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, list[str]]:
    """Tokenise what is not yet: the token directories under "train" and "valid".

    One process does this, others map the same files by `open_built`.
    """
    checked = check_inputs(config, args)
    tokens = Path(args.tokens) if args.tokens else out / "tokens"
    tokenizer = checked.tokenizer or _own_tokenizer(config, checked.sources, tokens, progress)
    _check_vocabulary(config, tokenizer, str(tokens / "tokenizer.json"))

    def streams(directories: list[Path], sources: list[Source], name: str) -> list[Path]:
        if directories or not sources:
            return directories
        remove_leftovers(tokens / name)
        return [
            build_shards(sources, tokenizer, tokens / name, workers=args.workers, progress=progress)
        ]

    train_dirs = streams(checked.directories, checked.sources, "train")
    valid_dirs = streams(checked.valid_directories, checked.valid_sources, "valid")
    return {"train": [str(path) for path in train_dirs], "valid": [str(p) for p in valid_dirs]}


def open_built(config: TrainConfig, built: dict[str, list[str]]) -> Prepared:
    """Map what `build` has made. Raises ValueError."""
    train_dirs, valid_dirs = built["train"], built["valid"]
    train = join_streams([open_stream(path) for path in train_dirs])
    valid = join_streams([open_stream(path) for path in valid_dirs]) if valid_dirs else None
    if valid is not None and valid.tokenizer_sha256 != train.tokenizer_sha256:
        raise ValueError(f"{valid_dirs[0]} was made with another tokenizer than {train_dirs[0]}")
    sha256 = {
        "train": " ".join(token_directory_sha256(path) for path in train_dirs),
        "valid": " ".join(token_directory_sha256(path) for path in valid_dirs),
    }
    if valid is None:
        train, valid = _hold_out(config, train)
    return Prepared(train, valid, train.tokenizer, sha256)


def _hold_out(config: TrainConfig, stream: TokenStream) -> tuple[TokenStream, TokenStream | None]:
    """The stream's last valid_fraction (at least one window) as held-out text."""
    if config.valid_fraction == 0:
        return stream, None
    held = max(int(len(stream) * config.valid_fraction), config.sequence_length + 1)
    if held + 2 * config.sequence_length > len(stream):
        raise ValueError(
            f"sequence_length {config.sequence_length} is too long for data of {len(stream)} "
            f"tokens of which {held} are held out"
        )
    border = len(stream) - held
    return stream.part(0, border), stream.part(border, len(stream))


def _own_tokenizer(
    config: TrainConfig, sources: list[Source], tokens: Path, progress: Progress
) -> Tokenizer:
    """Train one on the data, or take the one that an earlier start trained on the same data."""
    origin: dict[str, Any] = {
        "vocab_size": config.model.vocab_size,
        "sources": [source.stamp() | source.settings() for source in sources],
    }
    if not config.model.causal:
        origin["kind"] = "wordpiece"
    file, origin_file = tokens / "tokenizer.json", tokens / "tokenizer-origin.json"
    try:
        if json.loads(origin_file.read_text("utf-8")) == origin:
            return load_tokenizer(file)
    except (OSError, ValueError):
        pass
    progress("training a tokenizer", 0, 0)
    train = train_tokenizer if config.model.causal else train_word_piece
    tokenizer = train(sources, config.model.vocab_size)
    tokens.mkdir(parents=True, exist_ok=True)
    origin_file.unlink(missing_ok=True)
    write_file(file, tokenizer.to_str().encode("utf-8"))
    write_json(origin_file, origin)
    return tokenizer


def with_token_ids(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's config with the tokenizer's special ids."""
    special = special_ids(tokenizer)
    return dataclasses.replace(
        model, bos_token_id=special.bos, eos_token_id=special.eos, pad_token_id=special.pad
    )
