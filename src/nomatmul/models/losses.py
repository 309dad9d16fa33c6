"""The loss behind a head, fused with it where that serves, and what labels may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nomatmul.models.block import fused_wanted, watched
from nomatmul.models.layers import BitLinear, DenseLinear
from nomatmul.models.stored import AnyHead
from nomatmul.ops.loss import (
    IGNORE_INDEX,
    Mixed,
    Taught,
    chunked_cross_entropy,
    linear_cross_entropy,
    mixed_cross_entropy,
)


def share_of_batch(loss: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """A mean over the labels that are not -100 as a share of a batch with `items` such labels.

    So the losses of micro-batches add up to the mean of the whole batch; None leaves the mean.
    """
    if items is None:
        return loss
    return loss * ((labels != IGNORE_INDEX).sum() / items)


def check_labels(labels: Tensor, count: int, training: bool, what: str) -> None:
    """Raise ValueError for a label that is neither -100 nor one of `count`; `what` says of what.

    Looking at the values makes a GPU wait: in training the loss of a label that does not exist is
    NaN there instead, and a compiled model never looks.
    """
    if torch.compiler.is_compiling() or (training and labels.is_cuda):
        return
    low, high = (int(v) for v in torch.aminmax(torch.where(labels == IGNORE_INDEX, 0, labels)))
    if low < 0 or high >= count:
        raise ValueError(f"label {low if low < 0 else high} is out of range: {what}")


def head_loss(
    head: AnyHead, hidden: Tensor, targets: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and z of targets behind `head`, see `chunked_cross_entropy`."""
    hooked = bool(head._forward_hooks) and not torch.compiler.is_compiling()
    fuse = fused_wanted(hidden) and not hooked and not watched(head)
    if fuse and isinstance(head, BitLinear | DenseLinear):  # and no adapter's wrapper
        options = _head_options(head)
        return linear_cross_entropy(hidden, targets, head.weight, chunk=chunk, **options)
    return chunked_cross_entropy(hidden, targets, head, chunk=chunk)


def mixed_head_loss(
    head: AnyHead, hidden: Tensor, targets: Tensor, *, taught: Taught, chunk: int
) -> Mixed:
    """The same with a teacher's distribution among the targets, see `mixed_cross_entropy`."""
    assert isinstance(head, BitLinear | DenseLinear), "checked before a run begins"
    options = _head_options(head) | {"chunk": chunk, "taught": taught}
    return mixed_cross_entropy(hidden, targets, head.weight, **options)


def _head_options(head: BitLinear | DenseLinear) -> dict[str, Any]:
    """What the fused losses take of a head beside its weight."""
    if isinstance(head, DenseLinear):
        return {}
    return {
        "norm": head.norm.weight,
        "eps": head.norm.eps,
        "slot": head.slot,
        "full_precision": head.full_precision,
    }
