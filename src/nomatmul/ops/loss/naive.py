"""Mean cross-entropy over chunks of tokens; the logits of one chunk live at a time.

Shape suffixes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Targets with this value count neither in the sum nor in the mean."""


def cross_entropy_rows(
    logits_NV: Tensor,
    target_N: Tensor,
    ignored: int,
    loss_scale: Tensor,
    z_scale: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p(target) and logsumexp^2 of each row, zero where the target is `ignored`.

    Returns (loss [N], z [N], dlogits [N, V] in the logits' type): the gradient of
    loss_scale * sum(loss) + z_scale * sum(z), the logits themselves if it is not wanted.
    The Triton kernel writes it over the logits.
    """
    x_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    lse_N = torch.logsumexp(x_NV, -1)
    counted_N = target_N != ignored
    index_N1 = torch.where(counted_N, target_N, 0).unsqueeze(-1)
    loss_N = torch.where(counted_N, lse_N - x_NV.gather(-1, index_N1).squeeze(-1), 0.0)
    z_N = torch.where(counted_N, lse_N.square(), 0.0)
    if not gradient:
        return loss_N, z_N, logits_NV
    d_NV = torch.exp(x_NV - lse_N[:, None]) * (loss_scale + 2 * z_scale * lse_N)[:, None]
    d_NV = d_NV.scatter_add(-1, index_N1, -loss_scale.to(d_NV.dtype).expand(index_N1.shape))
    return loss_N, z_N, (d_NV * counted_N[:, None]).to(logits_NV.dtype)


def mixed_rows(
    logits_NV: Tensor,
    taught_NV: Tensor,
    target_N: Tensor,
    ignored: int,
    share: float,
    temperature: float,
    loss_scale: Tensor,
    z_scale: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cross_entropy_rows` with the distribution of a teacher among the targets.

    Source: arXiv 1503.02531, section 2.

    taught: its logits; columns beyond the student's are left out. Returns (loss [N], z [N],
    divergence [N], dlogits [N, V]): the first two as there, the third KL(teacher || student) of
    both softmax(logits / temperature), zero where the target is `ignored`. The gradient is that of
    loss_scale * ((1 - share) * sum(loss) + share * temperature^2 * sum(divergence)) + z_scale *
    sum(z). The Triton kernel writes it over the student's logits.
    """
    x_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    mix = loss_scale * (1 - share)
    loss_N, z_N, d_NV = cross_entropy_rows(x_NV, target_N, ignored, mix, z_scale, gradient)
    counted_N = target_N != ignored
    log_p_NV = torch.log_softmax(x_NV / temperature, -1)
    taught_NV = taught_NV[:, : x_NV.shape[1]].to(x_NV.dtype)
    log_t_NV = torch.log_softmax(taught_NV / temperature, -1)
    t_NV = log_t_NV.exp()
    # a probability of 0 has no part in the sum, whatever is infinite beside it
    parts_NV = torch.where(t_NV > 0, t_NV * (log_t_NV - log_p_NV), 0.0)
    divergence_N = torch.where(counted_N, parts_NV.sum(-1), 0.0)
    if not gradient:
        return loss_N, z_N, divergence_N, logits_NV
    taught = loss_scale * (share * temperature) * counted_N[:, None]
    d_NV = d_NV + taught * (log_p_NV.exp() - t_NV)
    return loss_N, z_N, divergence_N, d_NV.to(logits_NV.dtype)


def _chunk_sums(
    hidden_ND: Tensor, target_N: Tensor, head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_ND).float()
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    counted_N = target_N != IGNORE_INDEX
    picked_N = logits_NV.gather(-1, target_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = torch.where(counted_N, lse_N - picked_N, 0.0).sum()
    z = torch.where(counted_N, lse_N.square(), 0.0).sum()
    return loss, z


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor] | None = None,
    *,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and z = mean of logsumexp(logits)^2 (the z-loss of arXiv
    2204.02311, section 5).

    hidden: [..., D] with `head` (a module D -> V), or the logits [..., V] when head is None;
    targets: integer [...], IGNORE_INDEX where nothing is to be predicted. chunk: tokens whose
    logits are held at once; each chunk is recomputed in the backward pass; 0 means all at once,
    without recomputation.

    Returns two float32 scalars, 0 when no target counts. Raises ValueError if shapes disagree.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross-entropy: {tuple(hidden.shape[:-1])} tokens but targets {tuple(targets.shape)}"
        )
    if chunk < 0:
        raise ValueError(f"cross-entropy: chunk {chunk} is below 0")
    head = head if head is not None else torch.nn.Identity()
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    target_N = targets.reshape(-1)
    tokens = target_N.shape[0]
    count = (target_N != IGNORE_INDEX).sum().clamp(min=1)
    if not chunk or chunk >= tokens:
        loss, z = _chunk_sums(hidden_ND, target_N, head)
        return loss / count, z / count
    loss = z = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        part_loss, part_z = checkpoint(
            _chunk_sums, hidden_ND[part], target_N[part], head, use_reentrant=False
        )
        loss, z = loss + part_loss, z + part_z
    return loss / count, z / count
