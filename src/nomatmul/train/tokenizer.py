"""The tokenizer of a run: taken from a file, or trained on the data as byte-level BPE.

The trained one loses nothing: no normaliser, all 256 bytes in the alphabet, single digits. Its
special tokens are `<|endoftext|>` (id 0: ends a document, and stands before the first word of the
next one) and `<|pad|>` (id 1). Text that spells a special token is encoded as ordinary text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nomatmul.train.documents import Source, read_pieces

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SAMPLE_BYTES = 64 << 20  # more text hardly changes the merges, and costs minutes
_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", END_OF_TEXT)
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_PAD_NAMES = (PAD, "<pad>", "[PAD]")


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. bos is None or equal to eos where documents get no start token."""

    bos: int | None
    eos: int
    pad: int | None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json (or a directory that has one). Raises ValueError or OSError."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    with open(file, "rb") as stream:
        text = stream.read()
    try:
        tokenizer = Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        hint = " (a SentencePiece model must be converted first)" if text[:1] != b"{" else ""
        raise ValueError(f"{file} is no tokenizer.json{hint}: {error}") from None
    prepare(tokenizer)
    return tokenizer


def prepare(tokenizer: Tokenizer) -> None:
    """Switch off what must not act on training text: padding, truncation, special words in text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON: equal means equal ids for every text."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Find the special tokens by their customary names. Raises ValueError without an end token."""

    def first(names: Iterable[str]) -> int | None:
        ids = (tokenizer.token_to_id(name) for name in names)
        return next((id_ for id_ in ids if id_ is not None), None)

    eos = first(_EOS_NAMES)
    if eos is None:
        raise ValueError(f"the tokenizer has no end token: one of {', '.join(_EOS_NAMES)}")
    return SpecialIds(bos=first(_BOS_NAMES), eos=eos, pad=first(_PAD_NAMES))


def train_tokenizer(sources: list[Source], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with at most vocab_size entries on up to 64 MiB of the sources.

    The same sources give the same tokenizer. Raises ValueError when vocab_size has no room for the
    256 bytes and the special tokens.
    """
    special = [END_OF_TEXT, PAD]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least} (256 bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(sources), trainer)
    prepare(tokenizer)
    return tokenizer


def _sample(sources: list[Source]) -> Iterator[str]:
    """The head of every source, an equal share of bytes each."""
    share = max(SAMPLE_BYTES // len(sources), 1)
    for source in sources:
        left = share
        for text, _ in read_pieces(source):
            left -= len(text.encode("utf-8"))
            yield text
            if left <= 0:
                break
