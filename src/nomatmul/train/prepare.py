"""From checked inputs to token streams: the tokenizer first, then shards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import remove_leftovers, write_json
from nomatmul.formats.special_tokens import CHAT_TOKENS, special_ids
from nomatmul.train.config import TrainConfig
from nomatmul.train.conversations import stored_template
from nomatmul.train.documents import Source
from nomatmul.train.inputs import Checked, check_vocabulary
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
class Prepared:
    """What training needs of the data. sha256: of all the tokens, to recognise them on a resume.

    template: the chat template, if there are conversations among the documents.
    """

    train: TokenStream
    valid: TokenStream | None
    tokenizer: Tokenizer
    sha256: dict[str, str]
    template: str | None = None


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
    check_vocabulary(config, tokenizer, str(tokens / "tokenizer.json"))

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
