"""A SentencePiece vocabulary, wherever it was read, as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces
SPACE = "\u2581"  # the mark that SentencePiece writes for a space


@dataclass(frozen=True)
class Vocabulary:
    """What the file says: pieces with score and type, in id order, and its settings.

    character_map is SentencePiece's compiled table of replacements (NFKC and others), empty for
    none; single_spaces: runs of spaces count as one, those at both ends not at all. unigram: texts
    are cut the likeliest way (else by merges, BPE).
    """

    pieces: list[tuple[str, float, int]]
    byte_fallback: bool
    add_dummy_prefix: bool
    character_map: bytes = b""
    single_spaces: bool = False
    unigram: bool = False


def build_tokenizer(vocabulary: Vocabulary, source: object) -> Any:
    """The `tokenizers.Tokenizer` that splits text as SentencePiece does; source names the file.

    Raises ValueError for a unigram vocabulary without a piece for unknown characters, and for a
    damaged table of characters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    tokenizer = Tokenizer(_model(vocabulary, source))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(vocabulary))
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    special = [p for p, _, kind in vocabulary.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    added = [p for p, _, kind in vocabulary.pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in added])
    return tokenizer


def _model(vocabulary: Vocabulary, source: object) -> Any:
    from tokenizers import models

    ids = {piece: i for i, (piece, _, _) in enumerate(vocabulary.pieces)}
    unknown = next((p for p, _, kind in vocabulary.pieces if kind == UNKNOWN), None)
    if not vocabulary.unigram:
        return models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    if unknown is None:
        raise ValueError(f"{source} has no piece for unknown characters, which unigram needs")
    return models.Unigram(
        [(piece, score) for piece, score, _ in vocabulary.pieces],
        ids[unknown],
        byte_fallback=vocabulary.byte_fallback,
    )


def _normalizers(vocabulary: Vocabulary) -> list[Any]:
    """What SentencePiece does to a text before it is cut, in its order."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if vocabulary.character_map:
        try:
            steps.append(normalizers.Precompiled(vocabulary.character_map))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"damaged table of characters in a SentencePiece file: {error}"
            ) from None
    if vocabulary.single_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if vocabulary.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best score first: the order BPE applies them."""
    found: list[tuple[float, int, int, int, str, str]] = []
    mergeable = (NORMAL, USER_DEFINED)
    for piece, score, kind in vocabulary.pieces:
        if kind not in mergeable:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-score, -len(left), -len(right), ids[left], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
