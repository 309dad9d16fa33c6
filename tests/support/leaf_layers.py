"""Small layers of the leaf form, and what one leaf and the nodes of a tree compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from studies.fff.leaf import LeafFFF

DENSE = {"bias": True, "out": 4}
TERNARY = {"linear": "ternary", "out": 4}


def tokens() -> torch.Tensor:
    """[11, 6], float64."""
    return torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def make(seed: int = 0, **options: Any) -> LeafFFF:
    """A layer of 6 inputs, float64, none of whose parameters is zero."""
    torch.manual_seed(seed)
    layer = LeafFFF(6, **{"leaf_width": 3, "trees": 2, "depth": 2, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def leaf_output(layer: LeafFFF, x: torch.Tensor, leaf: int) -> torch.Tensor:
    """One leaf of a dense layer, for one token."""
    h = F.gelu(layer.leaf_in[leaf] @ x + layer.leaf_in_bias[leaf])
    return layer.leaf_out[leaf] @ h + layer.leaf_out_bias[leaf]


def node_logits(layer: LeafFFF, x: torch.Tensor, tree: int) -> torch.Tensor:
    """The three nodes of a tree of depth 2, for one token."""
    rows = slice(tree * 3, tree * 3 + 3)
    return layer.nodes[rows] @ x + layer.node_bias[rows]
