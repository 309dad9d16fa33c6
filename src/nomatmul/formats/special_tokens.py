"""Special tokens found by their customary names, for tokenizers whose model does not name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
# Of tokenizers that are made here for conversations (formats.chat_template.DEFAULT_TEMPLATE).
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<cls>", END_OF_TEXT)
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<sep>")
PAD_NAMES = (PAD, "<pad>", "[PAD]")
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
CLS_NAMES = ("[CLS]", "<cls>")
SEP_NAMES = ("[SEP]", "<sep>")


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. bos is None or equal to eos where documents get no start token."""

    bos: int | None
    eos: int
    pad: int | None


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Find the special tokens by their customary names. Raises ValueError without an end token."""
    eos = _first_id(tokenizer, _EOS_NAMES)
    if eos is None:
        raise ValueError(f"the tokenizer has no end token: one of {', '.join(_EOS_NAMES)}")
    bos, pad = _first_id(tokenizer, _BOS_NAMES), _first_id(tokenizer, PAD_NAMES)
    return SpecialIds(bos=bos, eos=eos, pad=pad)


def mask_id(tokenizer: Tokenizer) -> int:
    """Id of the token that hides another one. Raises ValueError when there is none."""
    found = _first_id(tokenizer, MASK_NAMES)
    if found is None:
        raise ValueError(
            "the tokenizer has no mask token, which an encoder is trained with: one of "
            f"{', '.join(MASK_NAMES)}"
        )
    return found


def first_name(tokenizer: Tokenizer, names: Iterable[str]) -> str | None:
    """The first of `names` that is a token."""
    return next((name for name in names if tokenizer.token_to_id(name) is not None), None)


def _first_id(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    name = first_name(tokenizer, names)
    return None if name is None else tokenizer.token_to_id(name)
