"""What the user names as data: every mistake that can be found without work, found before it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenizers import Tokenizer

from nomatmul.formats.chat_template import DEFAULT_TEMPLATE
from nomatmul.formats.special_tokens import mask_id, special_ids
from nomatmul.train.config import TrainConfig
from nomatmul.train.conversations import check_tokens, template_beside
from nomatmul.train.documents import Source, begins_with_conversation, find_sources
from nomatmul.train.pipes import refuse_repeated
from nomatmul.train.shards import is_token_directory
from nomatmul.train.tokenizer import fingerprint, load_tokenizer


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
        check_vocabulary(config, tokenizer, args.tokenizer or str(directories[0]))
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


def check_vocabulary(config: TrainConfig, tokenizer: Tokenizer, name: str) -> None:
    """Raises ValueError for a tokenizer with more entries than the model; `name` says which."""
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if size > config.model.vocab_size:
        raise ValueError(
            f"{name} has {size} entries, model.vocab_size is {config.model.vocab_size}: "
            f"add --set model.vocab_size={size}"
        )
