"""Which matrices of a checkpoint are stored as ternary values and scales."""

from __future__ import annotations

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.files.quantised import Quantised


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
