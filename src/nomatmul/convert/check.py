"""Does a packed model say what its source says? Both on one text.

The packed model runs in the engine. A decoder's source runs in torch where torch is installed, else
in the numpy oracle, an encoder's in the oracle. Legend: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nomatmul.convert.agreement import Floats, mean_kl, mean_loss, relative_error, same_argmax
from nomatmul.convert.check_text import CheckText, more_ids, token_ids
from nomatmul.convert.head import HeadCost, int8_cost
from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.host_memory import available_memory
from nomatmul.formats.packed import PackedReader


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


@dataclass(frozen=True)
class SourceRun:
    """A decoder's source on a text: float32 logits [T, V] of its ids, what computed them, and what
    int8 rows would cost its head (None where nobody asked, or its numbers are not finite)."""

    ids: list[int]
    text: str
    logits_TV: Floats
    backend: str
    head: HeadCost | None = None


def run_source(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer_path: Path | None, text: CheckText
) -> SourceRun | None:
    """Run a published transformer with a float head ahead of its packing; None where it would not
    fit in memory. config, tokenizer_path: those that will be packed.

    Raises ValueError for a text too short to compare on, and what reading the model does.
    """
    from nomatmul.reference.linear import FloatLinear
    from nomatmul.reference.model import ReferenceModel

    ids, named = token_ids(config, tokenizer_path, text)
    if not _fits(checkpoint):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # told by what follows
        model = ReferenceModel.from_checkpoint(checkpoint)
        output = model.forward(more_ids(config, tokenizer_path, ids))
        logits_BTV, head = output.logits_BTV, output.head
    assert isinstance(head, FloatLinear)
    wanted_TV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    hidden_TD = output.hidden_BTD.reshape(len(wanted_TV), -1)
    cost = int8_cost(head.weight_NK, hidden_TD, wanted_TV)
    return SourceRun(ids, named, logits_BTV[0, : len(ids)].copy(), "numpy oracle", cost)


def check_packed(
    checkpoint: Checkpoint, packed: Path, text: CheckText, run: SourceRun | None = None
) -> PackCheck | EncoderCheck | None:
    """Run the source and the packed model on a text and compare; None, with a warning, where the
    source would not fit in memory. run: of the source, where it was run already.

    Without a tokenizer the text is replaced by fixed pseudo-random token ids.
    Raises ValueError for a text too short to compare on.
    """
    reader = PackedReader(packed)
    if checkpoint.reading is not None:
        return _check_encoder(checkpoint, checkpoint.reading, reader, text)
    if run is None and not _fits(checkpoint):
        needed, available = _source_bytes(checkpoint), available_memory()
        warnings.warn(
            f"{packed} was not compared with its source, which would need"
            f" {needed / 1e9:.1f} GB of memory of {(available or 0) / 1e9:.1f} that are free",
            stacklevel=2,
        )
        return None
    return _check_decoder(checkpoint, reader, text, run)


def _check_decoder(
    checkpoint: Checkpoint, reader: PackedReader, text: CheckText, run: SourceRun | None
) -> PackCheck:
    ids, named = (
        (run.ids, run.text) if run else token_ids(reader.config, reader.tokenizer_path, text)
    )
    found_TV, isa = _packed_logits(reader, ids)
    wanted_TV, source_backend = (
        (run.logits_TV, run.backend) if run else _source_logits(checkpoint, ids)
    )
    return PackCheck(
        tokens=len(ids),
        text=named,
        source_backend=source_backend,
        packed_backend="numpy oracle" if isa is None else f"engine ({isa})",
        largest_difference=float(np.abs(found_TV - wanted_TV).max()),
        largest_logit=float(np.abs(wanted_TV).max()),
        relative_error=relative_error(found_TV, wanted_TV),
        same_argmax=same_argmax(found_TV, wanted_TV),
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

    ids, named = token_ids(reader.config, reader.tokenizer_path, text)
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
        hidden_error=relative_error(model.hidden(ids_BT), expected.hidden_BTD),
        logit_error=relative_error(logits, wanted),
        largest_difference=float(np.abs(logits - wanted).max()),
        largest_logit=float(np.abs(wanted).max()),
        same_argmax=float(np.mean(logits.argmax(-1) == wanted.argmax(-1))),
        same_path=float(np.mean(same)) if same else None,
    )


def _fits(checkpoint: Checkpoint) -> bool:
    """Whether memory holds a decoder's source."""
    available = available_memory()
    return available is None or _source_bytes(checkpoint) <= available


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
    return KvCost(mean_kl(wanted_TV, found_TV), same_argmax(found_TV, wanted_TV))


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
