"""The text that a model and its packed form are compared on, as token ids.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.texts import read_text
from nomatmul.formats.tokenizer import load_tokenizer

# The opening of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain).
DEFAULT_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it, and what is the use of a book, thought Alice, without "
    "pictures or conversations? So she was considering in her own mind (as well as she could, for "
    "the hot day made her feel very sleepy and stupid), whether the pleasure of making a "
    "daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a "
    "White Rabbit with pink eyes ran close by her."
)
# How it goes on: read behind a text that has too few tokens to judge a head by.
MORE_TEXT = (
    " There was nothing so very remarkable in that; nor did Alice think it so very much out of the "
    "way to hear the Rabbit say to itself, Oh dear! Oh dear! I shall be late! (when she thought it "
    "over afterwards, it occurred to her that she ought to have wondered at this, but at the time "
    "it all seemed quite natural); but when the Rabbit actually took a watch out of its "
    "waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it "
    "flashed across her mind that she had never before seen a rabbit with either a "
    "waistcoat-pocket, or a watch to take out of it, and burning with curiosity, she ran across "
    "the field after it, and fortunately was just in time to see it pop down a large rabbit-hole "
    "under the hedge. In another moment down went Alice after it, never once considering how in "
    "the world she was to get out again. The rabbit-hole went straight on like a tunnel for some "
    "way, and then dipped suddenly down, so suddenly that Alice had not a moment to think about "
    "stopping herself before she found herself falling down a very deep well."
)
MAX_TOKENS = 256
# To judge a head by, a share near its limit: as many of small models as cost little.
LEAST_POSITIONS, MOST_POSITIONS = 200, 1024
_WORK = 1 << 36  # positions times parameters


@dataclass(frozen=True)
class CheckText:
    """A text to compare two models on, and what to call it."""

    text: str = DEFAULT_TEXT
    name: str = "built-in paragraph"

    @classmethod
    def read(cls, path: str | Path | None) -> CheckText:
        """The beginning of a text file (plain or compressed); None is the built-in paragraph."""
        if path is None:
            return cls()
        return cls(read_text(path, max_bytes=MAX_TOKENS * 64), str(path))


def token_ids(
    config: ModelConfig, tokenizer_path: Path | None, text: CheckText
) -> tuple[list[int], str]:
    """(ids, what they are called); a decoder reads the text behind its begin token, an encoder
    between its special tokens. Without a tokenizer they are fixed pseudo-random numbers.

    Raises ValueError for a text, or a model, too short to compare on.
    """
    encoder = not config.causal
    limit = min(config.max_position_embeddings, 128) if encoder else _limit(config)
    if limit < 2:
        raise ValueError(f"the model has {limit} position; the check needs two or more")
    if tokenizer_path is None:
        count = min(limit, 64) * (2 if encoder else 1)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, count)
        return ids.tolist(), "random token ids"
    tokenizer = load_tokenizer(tokenizer_path)
    found = list(tokenizer.encode(text.text, add_special_tokens=encoder).ids)
    if not encoder and config.bos_token_id is not None:
        found.insert(0, config.bos_token_id)
    if len(found[:limit]) < 2:
        raise ValueError(f"{text.name} has {len(found)} token(s); the check needs two or more")
    return found[:limit], text.name


def more_ids(config: ModelConfig, tokenizer_path: Path | None, ids: list[int]) -> NDArray[np.int64]:
    """int64 [B, T] of a decoder: the first sequence begins with `ids`, others go on with what
    follows: LEAST_POSITIONS to MOST_POSITIONS in all, where there is as much text."""
    if tokenizer_path is None:
        more = np.random.default_rng(1).integers(0, config.vocab_size, MOST_POSITIONS + MAX_TOKENS)
        rest = more.tolist()
    else:
        rest = load_tokenizer(tokenizer_path).encode(MORE_TEXT, add_special_tokens=False).ids
    stream = [*ids, *rest]
    width = min(_limit(config), len(stream))
    cheap = _WORK // config.param_count()
    wanted = min(max(LEAST_POSITIONS, cheap), MOST_POSITIONS)
    count = max(1, min(-(-wanted // width), len(stream) // width))
    return np.array(stream[: count * width], np.int64).reshape(count, width)


def _limit(config: ModelConfig) -> int:
    """Tokens of a decoder's longest sequence here."""
    return min(MAX_TOKENS, architecture_of(config).max_length or MAX_TOKENS)
