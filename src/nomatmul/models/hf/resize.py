"""Another vocabulary size for a model: embedding, head and config change together, or not at all.

Shape suffixes: V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nomatmul.models.layers import BitLinear, DenseLinear, TernaryLinear
from nomatmul.ops.bitlinear import new_slot


def resize_vocabulary(model: Any, size: int, *, around_mean: bool = True) -> None:
    """Give a TextModel `size` tokens: rows are cut off or added at the end, the others stay.

    New rows lie at the mean of the old ones if `around_mean`, else they are normal with
    `initializer_range`. A ternary head has one scale, the mean of |W|, for all its rows (unless it
    has groups): its new rows are spread like the old ones and scaled so that this mean stays, and
    with it the old tokens' logits (up to float rounding). Cut rows take their share of it along,
    so logits move.

    Raises ValueError, with the model as it was, for a size that is no number above 0 or leaves out
    a special token of the config, and for layers that are no longer the model's own.
    """
    embedding, head = model.embedding, getattr(model, "head", None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"the number of tokens must be a whole number above 0, got {size!r}")
    config = model.config.model_config
    changed = type(config).from_dict({**config.to_dict(), "vocab_size": size})
    shape = (config.vocab_size, config.hidden_size)
    own = isinstance(embedding, nn.Embedding) and isinstance(
        head, TernaryLinear | DenseLinear | None
    )
    parts = [embedding] if head is None else [embedding, head]
    if not own or any(tuple(part.weight.shape) != shape for part in parts):
        raise ValueError(
            f"cannot resize an embedding or head that was replaced, wrapped or sharded: each must "
            f"be the model's own layer of shape {list(shape)}"
        )
    tied = head is not None and head.weight is embedding.weight
    spread = around_mean, float(config.initializer_range)
    ternary = isinstance(head, TernaryLinear) and not head.form.scale_group
    table = _resized(embedding.weight, size, *spread, keep_absmean=tied and ternary)
    matrix = table
    if head is not None and not tied:
        matrix = _resized(head.weight, size, *spread, keep_absmean=ternary)
    # nothing fails from here on
    embedding.weight, embedding.num_embeddings = table, size
    if head is not None:
        head.weight, head.out_features = matrix, size
        if isinstance(head, BitLinear):
            head.slot = new_slot()  # what was kept for the old matrix must not serve the new one
    model.config.vocab_size = size
    model.model_config = changed


@torch.no_grad()
def _resized(
    old: nn.Parameter, size: int, around_mean: bool, std: float, *, keep_absmean: bool
) -> nn.Parameter:
    old_VD = old.detach()
    added = size - len(old_VD)
    if added <= 0:
        rows_VD = old_VD[:size].clone()
    else:
        new_VD = _new_rows(old_VD.float(), added, around_mean, std, keep_absmean)
        rows_VD = torch.cat([old_VD, new_VD.to(old_VD.dtype)])
    return nn.Parameter(rows_VD, requires_grad=old.requires_grad)


def _new_rows(
    old_VD: Tensor, count: int, around_mean: bool, std: float, keep_absmean: bool
) -> Tensor:
    noise_VD = torch.randn(count, old_VD.shape[1], device=old_VD.device)
    mean_D = old_VD.mean(0) if around_mean else torch.zeros_like(old_VD[0])
    if not keep_absmean:
        return mean_D.expand(count, -1) if around_mean else std * noise_VD
    spread_D = old_VD.std(0, unbiased=False) if around_mean else std
    rows_VD = mean_D + spread_D * noise_VD
    absmean = rows_VD.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return rows_VD * (old_VD.abs().mean() / absmean)
