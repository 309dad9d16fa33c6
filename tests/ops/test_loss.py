"""Chunked cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nomatmul.ops.loss import IGNORE_INDEX, chunked_cross_entropy


@pytest.mark.parametrize("chunk", [0, 1, 4, 10, 100])
def test_equals_torch_with_gradients(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13, bias=False).double()
    hidden = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 13, (2, 5))
    targets[0, 1] = IGNORE_INDEX
    loss, z = chunked_cross_entropy(hidden, targets, head, chunk=chunk)
    logits = head(hidden)
    expected = F.cross_entropy(logits.reshape(-1, 13), targets.reshape(-1))
    lse = logits.logsumexp(-1)[targets != IGNORE_INDEX]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert z.item() == pytest.approx(lse.square().mean().item(), rel=1e-6)
    ours = torch.autograd.grad(loss, (hidden, head.weight), retain_graph=True)
    theirs = torch.autograd.grad(expected, (hidden, head.weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_nothing_to_learn_is_zero_not_nan():
    logits = torch.randn(3, 4)
    loss, z = chunked_cross_entropy(logits, torch.full((3,), IGNORE_INDEX))
    assert loss == 0
    assert z == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\(3,\) tokens but targets"):
        chunked_cross_entropy(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="below 0"):
        chunked_cross_entropy(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), chunk=-1)
