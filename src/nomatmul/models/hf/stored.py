"""Matrices that a checkpoint stores as ternary values and scales, and their tensors in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.files.quantised import Quantised
from nomatmul.ops.bitlinear import latents as latents_of


def stored_matrices(checkpoint: Checkpoint) -> dict[str, Quantised]:
    """{tensor name: values and scales} of all ternary matrices; empty where they are latent floats.

    Raises ValueError for a checkpoint that stores some of them and has floats for others.
    """
    model = architecture_of(checkpoint.config)
    groups = {
        f"{name}.weight": linear.scale_group
        for name, linear in model.linears().items()
        if linear.kind == "ternary" and not linear.tied
    }
    if model.embedding.kind == "ternary":
        groups["embedding.weight"] = model.embedding.scale_group
    found = {name: checkpoint.quantised(name) for name in groups}
    stored = {name: matrix for name, matrix in found.items() if matrix is not None}
    if stored and len(stored) < len(found):
        latent = next(name for name in found if name not in stored)
        raise ValueError(
            f"{checkpoint.directory}: {latent} is stored as floats, {next(iter(stored))} as ternary"
            " values: torch loads one kind or the other"
        )
    return {
        name: matrix.grouped(groups[name]) if groups[name] else matrix
        for name, matrix in stored.items()
    }


def tensors_of(name: str, matrix: Quantised, latents: bool) -> dict[str, Tensor]:
    """{name: tensor} of a matrix ("X.weight") in a model's state: its values and scale, or its
    `latents`, float32. Raises ValueError for a scale that no latent weights have."""
    rows, layer = slice(0, matrix.shape[0]), name.removesuffix(".weight")
    if latents and matrix.masters is not None:
        return {name: torch.from_numpy(np.array(matrix.masters(rows)))}
    # copies: what the reader returns may be a read-only view of a mapped file
    values = torch.from_numpy(np.array(matrix.read(rows)))
    scale = torch.from_numpy(np.array(matrix.scale))
    if latents:
        return {name: latents_of(values, scale)}
    return {f"{layer}.values": values, f"{layer}.scale": scale}
