"""Does a packed model say what its source says? Both on one text.

The packed model runs in the engine. A decoder's source runs in torch where torch is installed, else
in the numpy oracle, an encoder's in the oracle. Legend: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.encoder import EncoderReading
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

Floats = NDArray[np.float32]


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
class KvCost:
    """What int8 keys and values change, against those of float16 in the same packed model: nats a
    token, and the share of positions with the same most likely token."""

    mean_kl: float
    same_argmax: float


@dataclass(frozen=True)
class PackCheck:
    """Packed against source on `tokens` tokens.

    largest_difference and largest_logit are of logits; relative_error is the root mean square of
    the difference over that of the source's logits; same_argmax the share of positions with the
    same most likely token; losses in nats a token. kv_int8: None where there is no attention, or no
    native engine.
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
    mean_kl: float
    kv_int8: KvCost | None = None


@dataclass(frozen=True)
class EncoderCheck:
    """Packed against source on `tokens` tokens.

    relative_error: root mean square of the difference over that of the source, of the hidden
    states behind the final norm and of the head's logits. same_path: share of tokens, over all
    layers of trees, that visit the same nodes (None without trees). same_argmax: share of
    predictions (of tokens, or of sequences for a sequence classifier) that stay.
    """

    tokens: int
    text: str
    hidden_error: float
    logit_error: float
    largest_difference: float
    largest_logit: float
    same_argmax: float
    same_path: float | None


def check_packed(
    checkpoint: Checkpoint, packed: Path, text: CheckText
) -> PackCheck | EncoderCheck | None:
    """Run the source and the packed model on a text and compare; None, with a warning, where the
    source would not fit in memory.

    Without a tokenizer the text is replaced by fixed pseudo-random token ids.
    Raises ValueError for a text too short to compare on.
    """
    reader = PackedReader(packed)
    if checkpoint.reading is None:
        needed, available = _source_bytes(checkpoint), available_memory()
        if available is not None and needed > available:
            warnings.warn(
                f"{packed} was not compared with its source, which would need"
                f" {needed / 1e9:.1f} GB of memory of {available / 1e9:.1f} that are free",
                stacklevel=2,
            )
            return None
        return _check_decoder(checkpoint, reader, text)
    return _check_encoder(checkpoint, checkpoint.reading, reader, text)


def _check_decoder(checkpoint: Checkpoint, reader: PackedReader, text: CheckText) -> PackCheck:
    ids, named = _token_ids(reader, text)
    found_TV, isa = _packed_logits(reader, ids)
    wanted_TV, source_backend = _source_logits(checkpoint, ids)
    return PackCheck(
        tokens=len(ids),
        text=named,
        source_backend=source_backend,
        packed_backend="numpy oracle" if isa is None else f"engine ({isa})",
        largest_difference=float(np.abs(found_TV - wanted_TV).max()),
        largest_logit=float(np.abs(wanted_TV).max()),
        relative_error=_relative(found_TV, wanted_TV),
        same_argmax=_same_argmax(found_TV, wanted_TV),
        source_loss=mean_loss(wanted_TV, ids),
        packed_loss=mean_loss(found_TV, ids),
        mean_kl=mean_kl(wanted_TV, found_TV),
        kv_int8=None if isa in (None, "numpy") else _kv_cost(reader, ids, found_TV),
    )


def _check_encoder(
    checkpoint: Checkpoint, reading: EncoderReading, reader: PackedReader, text: CheckText
) -> EncoderCheck:
    from nomatmul.engine import load
    from nomatmul.engine.heads import TaskHead, pooled
    from nomatmul.reference.linear import stored_linear
    from nomatmul.reference.model import ReferenceModel

    ids, named = _token_ids(reader, text)
    ids_BT = np.reshape(ids, (-1, len(ids) if reader.tokenizer_path else len(ids) // 2))
    model = load(reader.directory, kind="encoder")
    expected = ReferenceModel.from_checkpoint(checkpoint).forward(ids_BT)
    logits = model.logits(ids_BT)
    states = expected.hidden_BTD
    if reading.task == "sequence":
        seen_T = np.ones(ids_BT.shape[1], bool)
        states = np.stack([pooled(hidden_TD, seen_T, reading) for hidden_TD in states])
    wanted = TaskHead(checkpoint.read, stored_linear, checkpoint.config, reading).logits(states)
    same = [
        (rows.reshape(expected.paths[layer].shape) == expected.paths[layer]).all(axis=(1, 2))
        for layer, rows in model.paths(ids_BT).items()
    ]
    return EncoderCheck(
        tokens=ids_BT.size,
        text=named,
        hidden_error=_relative(model.hidden(ids_BT), expected.hidden_BTD),
        logit_error=_relative(logits, wanted),
        largest_difference=float(np.abs(logits - wanted).max()),
        largest_logit=float(np.abs(wanted).max()),
        same_argmax=float(np.mean(logits.argmax(-1) == wanted.argmax(-1))),
        same_path=float(np.mean(same)) if same else None,
    )


def _source_bytes(checkpoint: Checkpoint) -> int:
    """What the oracle holds of a decoder: a byte of each weight that feeds on int8, else four."""
    model = architecture_of(checkpoint.config)
    held = 4 * model.vocabulary * model.size
    for linear in model.linears().values():
        if not (linear.tied and linear.kind == "dense"):
            short = linear.kind == "ternary" and not linear.scale_group
            held += linear.outputs * linear.inputs * (1 if short else 4)
    return held


def _packed_logits(reader: PackedReader, ids: list[int]) -> tuple[Floats, str | None]:
    """float32 [T, V] of a packed model by the engine, and its instruction set; None: by the oracle
    what the engine does not run."""
    from nomatmul.engine import load

    if not capability.runs(reader.config, "native"):
        from nomatmul.reference.model import ReferenceModel

        model = ReferenceModel.from_packed(reader)
        return model.forward(ids).logits_BTV[0], None
    lm = load(reader.directory, kind="language")
    return lm.logits(ids), lm.backend.isa


def _kv_cost(reader: PackedReader, ids: list[int], wanted_TV: Floats) -> KvCost | None:
    """Of a model with attention, whose logits float32 [T, V] with float16 keys are known."""
    from nomatmul.engine import load

    if architecture_of(reader.config).max_length is None:
        return None
    found_TV = load(reader.directory, kind="language", verify=False, kv="int8").logits(ids)
    return KvCost(mean_kl(wanted_TV, found_TV), _same_argmax(found_TV, wanted_TV))


def _source_logits(checkpoint: Checkpoint, ids: list[int]) -> tuple[Floats, str]:
    """float32 [T, V] of an unpacked model, and the backend that computed them.

    The numpy oracle serves published transformers, and where torch is absent or its float32 weights
    would not fit in memory (the oracle holds one byte a ternary weight).
    """
    if checkpoint.found is None and _torch_fits(checkpoint):
        import torch

        from nomatmul.models import CausalLM

        torch_model = CausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            return torch_model(torch.tensor([ids])).logits[0].float().numpy(), "torch"
    from nomatmul.reference.model import ReferenceModel

    return ReferenceModel.from_checkpoint(checkpoint).forward(ids).logits_BTV[0], "numpy oracle"


def _torch_fits(checkpoint: Checkpoint) -> bool:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return False
    available = available_memory()
    return available is None or 6 * checkpoint.config.param_count() < available


def _relative(found: Floats, wanted: Floats) -> float:
    """Root mean square of the difference over that of what is wanted."""
    power = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(found - wanted, dtype=np.float64))))
    return error / max(power, 1e-30)


def _same_argmax(found_TV: Floats, wanted_TV: Floats) -> float:
    return float(np.mean(found_TV.argmax(1) == wanted_TV.argmax(1)))


def mean_loss(logits_TV: Floats, ids: Sequence[int]) -> float:
    """Mean of -ln p(ids[t] | before) for t = 1..T-1, in float64."""
    found = _log_probabilities(logits_TV[:-1])
    return float(-np.mean(found[np.arange(len(found)), np.asarray(ids[1:])]))


def mean_kl(wanted_TV: Floats, found_TV: Floats) -> float:
    """Mean over positions of KL(wanted || found) of the next token, in nats, in float64."""
    wanted, found = _log_probabilities(wanted_TV), _log_probabilities(found_TV)
    return float(np.mean(np.sum(np.exp(wanted) * (wanted - found), axis=1)))


def _log_probabilities(logits_TV: Floats) -> NDArray[np.float64]:
    logits = logits_TV.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _token_ids(reader: PackedReader, text: CheckText) -> tuple[list[int], str]:
    """A decoder reads the text behind its begin token, an encoder between its special tokens."""
    config, encoder = reader.config, reader.reading is not None
    if encoder:
        limit = min(config.max_position_embeddings, 128)
    else:
        limit = min(MAX_TOKENS, architecture_of(config).max_length or MAX_TOKENS)
    if limit < 2:
        raise ValueError(f"the model has {limit} position; the check needs two or more")
    if reader.tokenizer_path is None:
        count = min(limit, 64) * (2 if encoder else 1)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, count)
        return ids.tolist(), "random token ids"
    tokenizer = load_tokenizer(reader.tokenizer_path)
    found = list(tokenizer.encode(text.text, add_special_tokens=encoder).ids)
    if not encoder and config.bos_token_id is not None:
        found.insert(0, config.bos_token_id)
    if len(found[:limit]) < 2:
        raise ValueError(f"{text.name} has {len(found)} token(s); the check needs two or more")
    return found[:limit], text.name
