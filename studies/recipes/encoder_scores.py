"""How many hidden words an encoder guesses, as trained and as packed.

Held-out windows and what is hidden in them are those of the trainer's evaluation, with BERT's share
of 15 %: of these 80 % are shown as the mask token, 10 % as random words, 10 % as they are.

A library of encoder.py. Shape suffixes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nomatmul
from nomatmul.formats.runs import find_checkpoint
from nomatmul.formats.special_tokens import mask_id
from nomatmul.models import MaskedLM
from nomatmul.train.batches import held_out_masked
from nomatmul.train.masking import Masking
from nomatmul.train.tokens import open_stream

TEXTS = ("wikipedia", "novels", "stories")
SHARE, LENGTH, ROWS = 0.15, 128, 16
SENTENCES = (
    "Paris is the capital of [MASK].",
    "The king and the [MASK] lived in a castle.",
    "Water freezes when it is very [MASK].",
    "She opened the [MASK] and went into the house.",
    "The river flows into the [MASK].",
    "He was born in London in the [MASK] century.",
    "The dog barked at the [MASK].",
    "The film was so [MASK] that everybody fell asleep.",
)

Logits = Callable[[np.ndarray], np.ndarray]


def trained_scores(args: argparse.Namespace, name: str) -> dict[str, dict[str, float]]:
    """Of the run WORK/NAME, on all texts."""
    device = "cuda" if args.device.startswith("cuda") else "cpu"
    model = MaskedLM.from_pretrained(find_checkpoint(args.work / name)).to(device).eval()

    @torch.no_grad()
    def logits(ids_BT: np.ndarray) -> np.ndarray:
        x_BT = torch.from_numpy(ids_BT).to(device)
        return np.asarray(model(input_ids=x_BT).logits.float().cpu())

    return {text: accuracy(logits, args.work / f"valid-{text}", args.windows) for text in TEXTS}


def packed_scores(args: argparse.Namespace, packed: Path) -> dict[str, Any]:
    """Of a packed model, on all texts; words for SENTENCES; speed. Slow without the native core."""
    engine = nomatmul.load(packed, kind="encoder")
    found = {
        text: accuracy(engine.logits, args.work / f"valid-{text}", args.windows) for text in TEXTS
    }
    return {"packed": found, "fill_mask": fillings(engine), "milliseconds": milliseconds(packed)}


def milliseconds(packed: Path) -> dict[str, float]:
    """CPU time of one thread for a window of LENGTH tokens and for 5, the least of 100 each."""
    engine, found = nomatmul.load(packed, kind="encoder", threads=1), {}
    random = np.random.default_rng(0)
    for tokens in (LENGTH, 5):
        ids_T = random.integers(10, engine.config.vocab_size, tokens)
        times = []
        for _ in range(100):
            began = time.process_time()
            engine.embed_ids([ids_T.tolist()])
            times.append(1000 * (time.process_time() - began))
        found[str(tokens)] = round(min(times), 3)
    return found


def fillings(engine: Any) -> dict[str, list[list[Any]]]:
    """The three likeliest words of each sentence, with their probabilities."""
    words = {}
    for sentence in SENTENCES:
        (found,) = engine.fill_mask(sentence, top_k=3)
        words[sentence] = [[f["token"], round(f["score"], 3)] for f in found]
    return words


def accuracy(logits: Logits, place: Path, windows: int) -> dict[str, float]:
    """Of the hidden words of the first windows: nats, share right, that of words shown as masks."""
    stream = open_stream(place)
    mask = mask_id(stream.tokenizer)
    vocabulary = 1 + max(stream.tokenizer.get_vocab(with_added_tokens=True).values())
    masking = Masking(round(SHARE * LENGTH), mask, vocabulary, 0)
    limit, cpu = windows * LENGTH, torch.device("cpu")
    nats, right, masked = 0.0, [], []
    for x_BT, y_BT, _ in held_out_masked(stream, LENGTH, ROWS, limit, masking, cpu):
        ids_BT, wanted_BT = x_BT.numpy(), y_BT.numpy()
        asked_BT = wanted_BT != -100
        z_NV = logits(ids_BT)[asked_BT].astype(np.float64)
        wanted_N = wanted_BT[asked_BT]
        z_NV -= z_NV.max(-1, keepdims=True)
        log_N = np.log(np.exp(z_NV).sum(-1)) - z_NV[np.arange(len(wanted_N)), wanted_N]
        nats += float(log_N.sum())
        right.append(z_NV.argmax(-1) == wanted_N)
        masked.append(ids_BT[asked_BT] == mask)
    right_N, masked_N = np.concatenate(right), np.concatenate(masked)
    return {
        "words": len(right_N),
        "nats": round(nats / len(right_N), 4),
        "accuracy": round(float(right_N.mean()), 4),
        "accuracy_masks": round(float(right_N[masked_N].mean()), 4),
    }
