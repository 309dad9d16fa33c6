"""From the user's file names to token streams: checks first, then tokenizer, then shards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.formats.chat_template import DEFAULT_TEMPLATE
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import remove_leftovers, write_json
from nomatmul.formats.special_tokens import CHAT_TOKENS, mask_id, special_ids
from nomatmul.train.config import TrainConfig
from nomatmul.train.conversations import check_tokens, stored_template, template_beside
from nomatmul.train.documents import Source, begins_with_conversation, find_sources
from nomatmul.train.pipes import refuse_repeated
from nomatmul.train.shards import (
    Progress,
    build_shards,
    is_current,
    is_token_directory,
)
from nomatmul.train.tokenizer import (
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    train_word_piece,
)
from nomatmul.train.tokens import TokenStream, join_streams, open_stream, token_directory_sha256

_ORIGIN_FILE = "tokenizer-origin.json"  # what the tokenizer was trained on, if it was trained here
_SHORTEST = 8  # tokens of a sequence that may be advised


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
    drop_document_start: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training needs of the data. sha256: of all the tokens, to recognise them on a resume.

    template: the chat template, if there are conversations among the documents.
    """

    train: TokenStream
    valid: TokenStream | None
    tokenizer: Tokenizer
    sha256: dict[str, str]
    template: str | None = None


@dataclasses.dataclass(frozen=True)
class Checked:
    """Inputs that exist and can be opened.

    conversations: whether a source begins with one. template: what renders them.
    """

    args: DataArgs
    directories: list[Path]
    sources: list[Source]
    valid_directories: list[Path]
    valid_sources: list[Source]
    tokenizer: Tokenizer | None
    conversations: bool
    template: str


def check_inputs(config: TrainConfig, args: DataArgs) -> Checked:
    """Find every mistake that needs no work to find, once: pipes are read to their end here.

    Raises ValueError or OSError.
    """
    refuse_repeated([*args.data, *args.valid])
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
    template = template_beside(args.tokenizer)
    conversations = any(map(begins_with_conversation, [*sources, *valid_sources]))
    if conversations:
        _check_conversations(config, tokenizer, template)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"workers {args.workers} must be at least 1")
    return Checked(
        args,
        directories,
        sources,
        valid_directories,
        valid_sources,
        tokenizer,
        conversations,
        template,
    )


def _split(names: tuple[str, ...], args: DataArgs) -> tuple[list[Path], list[Source]]:
    directories = [Path(name) for name in names if is_token_directory(name)]
    rest = [name for name in names if not is_token_directory(name)]
    if directories and rest:
        raise ValueError(f"{rest[0]} is text and {directories[0]} holds tokens: give one kind")
    if not rest:
        return directories, []
    drop = args.drop_document_start
    return directories, find_sources(rest, args.text_field, args.document_start, drop_start=drop)


def _check_conversations(config: TrainConfig, tokenizer: Tokenizer | None, template: str) -> None:
    if not config.model.causal:
        raise ValueError("an encoder is trained on texts, and the data has conversations")
    if tokenizer is not None and template == DEFAULT_TEMPLATE:
        check_tokens(tokenizer)


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer, name: str) -> None:
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if size > config.model.vocab_size:
        raise ValueError(
            f"{name} has {size} entries, model.vocab_size is {config.model.vocab_size}: "
            f"add --set model.vocab_size={size}"
        )


def build(
    config: TrainConfig,
    checked: Checked,
    out: Path,
    progress: Progress = lambda what, done, of: None,
    known: dict[str, str] | None = None,
) -> dict[str, list[str]]:
    """Tokenise what is not yet: the token directories under "train" and "valid".

    One process does this, others map the same files by `open_built`. known: checksums of the data
    that a run in `out` was made with (`data_checksums`); ValueError when the data are others,
    before the tokens of that run are replaced.
    """
    args = checked.args
    tokens = Path(args.tokens) if args.tokens else out / "tokens"
    if known is not None:
        refuse_changed(checked, tokens, known, out)
    special = CHAT_TOKENS if checked.conversations else ()
    tokenizer = checked.tokenizer or _own_tokenizer(
        config, checked.sources, tokens, special, progress
    )
    _check_vocabulary(config, tokenizer, str(tokens / "tokenizer.json"))

    def streams(directories: list[Path], sources: list[Source], name: str) -> list[Path]:
        if directories or not sources:
            return directories
        remove_leftovers(tokens / name)
        options: Any = {"workers": args.workers, "progress": progress}
        where = tokens / name
        return [build_shards(sources, tokenizer, where, template=checked.template, **options)]

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
    _check_length(config, train, share=config.valid_fraction if valid is None else 0.0)
    if valid is None and config.valid_fraction > 0:
        held = max(int(len(train) * config.valid_fraction), config.sequence_length + 1)
        border = len(train) - held
        train, valid = train.part(0, border), train.part(border, len(train))
    templates = {stored_template(path): None for path in train_dirs}
    templates.pop(None, None)
    if len(templates) > 1:
        raise ValueError(f"the conversations in {', '.join(train_dirs)} have several templates")
    template = next(iter(templates), None)
    return Prepared(train, valid, train.tokenizer, data_checksums(built), template)


def data_checksums(built: dict[str, list[str]]) -> dict[str, str]:
    """What tells that the tokens under "train" and "valid" are the same as before."""
    return {
        name: " ".join(token_directory_sha256(path) for path in paths)
        for name, paths in built.items()
    }


def _check_length(config: TrainConfig, stream: TokenStream, share: float) -> None:
    """Raise ValueError for a text too short to train on when `share` of it is held out.

    Needed are two sequences to train on and, where text is held out, one and a token more.
    """
    length, tokens = config.sequence_length, len(stream)
    needed = max(math.ceil(2 * length / (1 - share)), 3 * length + 1 if share else 0)
    if tokens >= needed:
        return
    size = ""
    if stream.text_bytes:
        size = f", about {math.ceil(needed * stream.text_bytes / tokens):,} bytes of text"
        have = f"{tokens:,} tokens ({stream.text_bytes:,} bytes)"
    else:
        have = f"{tokens:,} tokens"
    shorter = min(int(tokens * (1 - share) / 2), (tokens - 1) // 3 if share else tokens)
    advice = f", or set sequence_length={shorter}" if shorter >= _SHORTEST else ""
    raise ValueError(
        f"the text is too short: it has {have}, and training on sequences of {length} tokens"
        f" needs at least {needed:,}{size}; give more text{advice}"
    )


def refuse_changed(checked: Checked, tokens: Path, known: dict[str, str], out: Path) -> None:
    """Raise ValueError when the inputs are not those that the run in `out` was made with.

    Text is compared where its tokens still lie in `tokens`; where they do not, nothing can be lost.
    """
    for name, directories, sources in (
        ("train", checked.directories, checked.sources),
        ("valid", checked.valid_directories, checked.valid_sources),
    ):
        here = tokens / name
        if directories or not sources:
            paths = [str(path) for path in directories]
            same = data_checksums({name: paths})[name] == known.get(name, "")
        elif not is_token_directory(here) or token_directory_sha256(here) != known.get(name):
            same = bool(known.get(name))
        else:
            given = fingerprint(checked.tokenizer) if checked.tokenizer is not None else None
            own = given is None and (tokens / _ORIGIN_FILE).is_file()
            same = (own or given is not None) and is_current(here, sources, given, checked.template)
        if not same:
            raise ValueError(
                f"the data or the tokenizer of the run in {out} have changed; give the same ones"
                " again, or another directory"
            )


def _own_tokenizer(
    config: TrainConfig,
    sources: list[Source],
    tokens: Path,
    special: Sequence[str],
    progress: Progress,
) -> Tokenizer:
    """Train one on the data, or take the one that an earlier start trained on the same data."""
    origin: dict[str, Any] = {
        "vocab_size": config.model.vocab_size,
        "sources": [source.stamp() | source.settings() for source in sources],
    }
    if not config.model.causal:
        origin["kind"] = "wordpiece"
    if special:
        origin["special"] = list(special)
    file, origin_file = tokens / "tokenizer.json", tokens / _ORIGIN_FILE
    try:
        if json.loads(origin_file.read_text("utf-8")) == origin:
            return load_tokenizer(file)
    except (OSError, ValueError):
        pass
    progress("training a tokenizer", 0, 0)
    size = config.model.vocab_size
    tokenizer = (
        train_tokenizer(sources, size, special)
        if config.model.causal
        else train_word_piece(sources, size)
    )
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
