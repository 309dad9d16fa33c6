"""How the leaf form trains: its plan, and the weights with which a token mixes the leaves.

Shape suffixes: N tokens, T trees, M = 2^depth - 1 hyperplanes of a tree, F leaves of a tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nomatmul.models.channels.trees import FFFTraining


@dataclass(frozen=True)
class LeafTraining(FFFTraining):
    """How the leaf form trains, beside what `FFFTraining` says of all trees.

    hardening: weight of the entropy of soft decisions; region_leak: share of decisions turned round
    at random; hardness: from 0 (all leaves mixed) to 1 (one leaf, as in inference). The published
    runs moved hardness in a line from 0 to 1 over three quarters of a run, with hardening 0.01.

    Raises ValueError naming the value and the limit.
    """

    hardening: float = 0.0
    region_leak: float = 0.0
    hardness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.hardening) and self.hardening >= 0):
            raise ValueError(f"hardening {self.hardening} must be finite and at least 0")
        for name in ("region_leak", "hardness"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in 0..1")


def mixture(share_NTM: Tensor) -> Tensor:
    """Weight of every leaf, [N, T, F]: the product of the shares on its path; they sum to 1."""
    mix = share_NTM.new_ones(*share_NTM.shape[:2], 1)
    while mix.shape[-1] <= share_NTM.shape[-1]:
        level = mix.shape[-1]
        right = share_NTM[..., level - 1 : 2 * level - 1]
        mix = (mix.unsqueeze(-1) * torch.stack([1 - right, right], -1)).flatten(-2)
    return mix


def hard_leaves(z_NTM: Tensor, depth: int) -> Tensor:
    """Place among its tree's leaves that each walk ends at, int64 [N, T], from all logits."""
    place_NT = torch.zeros(z_NTM.shape[:2], dtype=torch.int64, device=z_NTM.device)
    for _ in range(depth):
        right = z_NTM.gather(-1, place_NT.unsqueeze(-1)).squeeze(-1) > 0
        place_NT = 2 * place_NT + 1 + right.long()
    return place_NT - ((1 << depth) - 1)
