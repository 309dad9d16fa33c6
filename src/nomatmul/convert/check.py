"""Does a packed model say what its source says? Logits and loss of both on one text.

The source runs in torch where torch is installed, else in the numpy oracle; the packed model runs
in the engine. Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomatmul.formats import capability
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.texts import read_text
from nomatmul.formats.host_memory import available_memory
from nomatmul.formats.packed import PackedReader
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
MAX_TOKENS = 256


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


@dataclass(frozen=True)
class PackCheck:
    """Packed against source on `tokens` tokens.

    largest_difference and largest_logit are of logits; relative_error is the root mean square of
    the difference over that of the source's logits; same_argmax the share of positions with the
    same most likely token; losses in nats a token.
    """

    tokens: int
    text: str
    source_backend: str
    packed_backend: str
    largest_difference: float
    largest_logit: float
    relative_error: float
    same_argmax: float
    source_loss: float
    packed_loss: float


def check_packed(source: Path, packed: Path, text: CheckText) -> PackCheck:
    """Run both models on a text and compare.

    Without a tokenizer the text is replaced by fixed pseudo-random token ids.
    Raises ValueError for a text too short to compare on.
    """
    reader = PackedReader(packed)
    tokenizer = None
    if reader.tokenizer_path is not None:
        tokenizer = load_tokenizer(reader.tokenizer_path)
    ids, named = _token_ids(tokenizer, reader.config, text)
    packed_TV, packed_backend = _packed_logits(reader, ids)
    source_TV, source_backend = source_logits(source, ids)
    return compare(source_TV, packed_TV, ids, named, source_backend, packed_backend)


def _packed_logits(reader: PackedReader, ids: Sequence[int]) -> tuple[np.ndarray, str]:
    """float32 [T, V] of a packed model: by the engine, or by the oracle what it does not run."""
    from nomatmul.engine import load

    if not capability.runs(reader.config, "native"):
        from nomatmul.reference.model import ReferenceModel

        model = ReferenceModel.from_packed(reader)
        return model.forward(list(ids)).logits_BTV[0], "numpy oracle"
    lm = load(reader.directory)
    return lm.logits(list(ids)), f"engine ({lm.backend.isa})"


def compare(
    source_TV: np.ndarray,
    packed_TV: np.ndarray,
    ids: Sequence[int],
    text: str,
    source_backend: str,
    packed_backend: str,
) -> PackCheck:
    """The figures of `PackCheck` from two tables of logits, float32 [T, V]."""
    difference_TV = np.abs(packed_TV - source_TV)
    power = float(np.sqrt(np.mean(np.square(source_TV, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(difference_TV, dtype=np.float64))))
    return PackCheck(
        tokens=len(ids),
        text=text,
        source_backend=source_backend,
        packed_backend=packed_backend,
        largest_difference=float(difference_TV.max()),
        largest_logit=float(np.abs(source_TV).max()),
        relative_error=error / max(power, 1e-30),
        same_argmax=float(np.mean(packed_TV.argmax(1) == source_TV.argmax(1))),
        source_loss=mean_loss(source_TV, ids),
        packed_loss=mean_loss(packed_TV, ids),
    )


def mean_loss(logits_TV: np.ndarray, ids: Sequence[int]) -> float:
    """Mean of -ln p(ids[t] | before) for t = 1..T-1, in float64."""
    logits = logits_TV[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits).sum(axis=1))
    return float(np.mean(log_total - logits[np.arange(len(logits)), np.asarray(ids[1:])]))


def source_logits(directory: Path, ids: Sequence[int]) -> tuple[np.ndarray, str]:
    """float32 [T, V] of an unpacked model, and the backend that computed them.

    The numpy oracle serves where torch is absent, or where its float32 weights would not fit in
    memory (the oracle holds one byte a weight).
    """
    if _torch_fits(directory):
        import torch

        from nomatmul.models import CausalLM

        model = CausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(torch.tensor([list(ids)])).logits[0].float().numpy(), "torch"
    from nomatmul.reference.model import ReferenceModel

    return ReferenceModel.load(directory).forward(list(ids)).logits_BTV[0], "numpy oracle"


def _torch_fits(directory: Path) -> bool:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return False
    needed = 4 * open_checkpoint(directory).config.param_count()
    available = available_memory()
    return available is None or needed * 1.5 < available


def _token_ids(tokenizer: Any, config: ModelConfig, text: CheckText) -> tuple[list[int], str]:
    if tokenizer is None:
        rng = np.random.default_rng(0)
        return rng.integers(0, config.vocab_size, size=64).tolist(), "random token ids"
    ids = list(tokenizer.encode(text.text, add_special_tokens=False).ids)
    if config.bos_token_id is not None:
        ids.insert(0, config.bos_token_id)
    if len(ids) < 2:
        raise ValueError(f"{text.name} has {len(ids)} token(s); the check needs two or more")
    return ids[:MAX_TOKENS], text.name
