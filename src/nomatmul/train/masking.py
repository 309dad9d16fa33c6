"""Masked language modelling: which tokens an encoder must guess, as a function of (seed, sample).

As crammed BERT does it (arXiv 2212.14034, and UltraFastBERT, 2311.10770): each sequence hides the
same number of its tokens, special ones included; of these the first 80 % are replaced by the mask
token, the next 10 % by random tokens, and the rest stay as they are.

Which tokens is decided by a hash of the seed, the sample's number in the run and the position. So
a batch needs no random state, and it is the same on a CPU and a GPU, and on any number of ranks.

Shapes: B rows of a micro-batch, T tokens, K guessed tokens of a row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
HELD_OUT_SEED = 0x5EED  # not the run's: all runs are judged by the same gaps


@dataclasses.dataclass(frozen=True)
class Masking:
    """What is hidden of each sequence. mask_id: the mask token; vocabulary: of random tokens."""

    count: int
    mask_id: int
    vocabulary: int
    seed: int

    def __call__(self, ids_BT: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs, targets) int64 [B, T]; what is not to be guessed has target -100.

        ids_BT: int64 token ids; samples_B: int64 numbers of the samples in the run.
        """
        places_BK = self.places(samples_B, ids_BT.shape[1])
        y_BT = torch.full_like(ids_BT, -100)
        hidden_BK = ids_BT.gather(1, places_BK)
        y_BT.scatter_(1, places_BK, hidden_BK)
        masks, replaced = round(0.8 * self.count), round(0.9 * self.count)
        shown_BK = hidden_BK.clone()
        shown_BK[:, :masks] = self.mask_id
        words_BT = hash_words(self.seed, samples_B, ids_BT.shape[1], stream=1) % self.vocabulary
        words_BK = words_BT.gather(1, places_BK)
        shown_BK[:, masks:replaced] = words_BK[:, masks:replaced]
        return ids_BT.scatter(1, places_BK, shown_BK), y_BT

    def places(self, samples_B: Tensor, length: int) -> Tensor:
        """[B, K] int64 positions to be guessed, in random order."""
        keys_BT = hash_words(self.seed, samples_B, length, stream=0)
        return keys_BT.argsort(dim=1, stable=True)[:, : self.count]


def hash_words(seed: int, samples_B: Tensor, length: int, stream: int) -> Tensor:
    """[B, length] int64 in [0, 2^32): a hash of seed, sample, position and stream.

    Rounds of MurmurHash3's finaliser in int64 arithmetic, which wraps alike on every device.
    """
    start = _mix_int((seed & _WORD) ^ _mix_int((seed >> 32) & _WORD) ^ _mix_int(stream + 1))
    row_B = _mix(_mix((samples_B & _WORD) ^ start) ^ (samples_B >> 32))
    place_T = torch.arange(length, dtype=torch.int64, device=samples_B.device)
    return _mix(row_B[:, None] ^ _mix(place_T * 2 + 1)[None, :])


def _mix(h: Tensor) -> Tensor:
    h = (h + 0x9E3779B9) & _WORD
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _WORD
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor(value, dtype=torch.int64)))
