"""The tokenizer of a run: taken from a file, or trained on the data.

Causal models get byte-level BPE, encoders WordPiece as BERT has it (a plain vocab.txt of it is
read too). The trained BPE loses nothing: no normaliser, all 256 bytes in the alphabet, single
digits. Its special tokens are `<|endoftext|>` (id 0: ends a document, and stands before the first
word of the next one) and `<|pad|>` (id 1). Text that spells a special token is encoded as ordinary
text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nomatmul.formats.special_tokens import END_OF_TEXT, PAD
from nomatmul.formats.tokenizer import load_tokenizer as open_tokenizer
from nomatmul.formats.tokenizer import prepare
from nomatmul.train.conversations import Conversation
from nomatmul.train.documents import Source, read_pieces

SAMPLE_BYTES = 64 << 20  # more text hardly changes the merges, and costs minutes
_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

WORD_PIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json or a WordPiece vocab.txt, or a directory that has one of them.

    Raises ValueError or OSError.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "vocab.txt").exists():
        file = path / "vocab.txt"
    if file.name.endswith("vocab.txt"):
        return read_vocabulary(file)
    return open_tokenizer(file)


def read_vocabulary(file: Path) -> Tokenizer:
    """BERT's tokenizer from its vocab.txt, one entry a line; lower-cased unless it has capitals.

    Raises ValueError for what is no such list, OSError.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason})") from None
    # Only line feeds end an entry: U+2028 or U+0085 may be one, at which `splitlines` would cut.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    ids = {line: number for number, line in enumerate(lines)}
    missing = [name for name in WORD_PIECE_SPECIAL if name not in ids]
    if missing:
        raise ValueError(f"{file} is no vocabulary of WordPiece: it lacks {missing[0]}")
    if len(ids) != len(lines):
        raise ValueError(f"{file} names an entry twice: {len(lines)} lines, {len(ids)} entries")
    words = (word for word in ids if not word.startswith("["))
    return word_piece(ids, lowercase=not any(word != word.lower() for word in words))


def word_piece(ids: dict[str, int], *, lowercase: bool = True) -> Tokenizer:
    """WordPiece with BERT's normaliser and cuts; a text becomes [CLS] A [SEP], a pair A [SEP] B."""
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if "[CLS]" not in ids:  # about to be trained
        return tokenizer
    tokenizer.add_special_tokens(list(WORD_PIECE_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    prepare(tokenizer)
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON: equal means equal ids for every text."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def train_word_piece(sources: list[Source], vocab_size: int) -> Tokenizer:
    """Train lower-cased WordPiece with at most vocab_size entries, on as much as `train_tokenizer`.

    The same sources give the same tokenizer. Raises ValueError when vocab_size has no room for the
    special tokens and some letters.
    """
    least = 128
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least} (special tokens and letters)")
    tokenizer = word_piece({"[UNK]": 0})
    counts: Counter[str] = Counter()
    for text in _sample(sources):
        counts.update(tokenizer.normalizer.normalize_str(text))
    letters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    letters = sorted(letters[: vocab_size // 8])
    # Left alone the trainer numbers letters inside words in an order that changes from run to run.
    inner = [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*WORD_PIECE_SPECIAL, *inner],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(sources), trainer)
    return word_piece(tokenizer.get_vocab(with_added_tokens=True))


def train_tokenizer(
    sources: list[Source], vocab_size: int, special: Sequence[str] = ()
) -> Tokenizer:
    """Train byte-level BPE with at most vocab_size entries on up to 64 MiB of the sources.

    special: tokens of their own that get ids 2, 3, ... (CHAT_TOKENS of a tokenizer for chats). The
    same sources give the same tokenizer. Raises ValueError when vocab_size has no room for the 256
    bytes and the special tokens.
    """
    special = list(dict.fromkeys([END_OF_TEXT, PAD, *special]))
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
        for piece, _ in read_pieces(source):
            text = piece.text if isinstance(piece, Conversation) else piece
            left -= len(text.encode("utf-8"))
            yield text
            if left <= 0:
                break
