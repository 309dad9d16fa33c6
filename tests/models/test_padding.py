"""Padding anywhere in a row is as if it were not there: outputs, states, gradients, every mixer."""

from __future__ import annotations

import pytest
import torch
from dials import DIALS

from nomatmul.models import MLGRU
from nomatmul.models.hf.cache import cache_of
from nomatmul.ops.mlgru import mlgru_scan

CLOSE = {"rtol": 0, "atol": 2e-5}
HOLES = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 0, 0, 0],
    "holes": [1, 0, 1, 1, 0, 0, 1, 1],
    "both ends": [0, 1, 1, 0, 1, 1, 1, 0],
}


@pytest.mark.parametrize("place", HOLES)
@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_a_padded_row_is_the_row_without_padding(build, ids, name, place):
    model, mask = build(name), torch.tensor([HOLES[place]])
    row = ids[:1, :5]
    padded = torch.full((1, 8), 63)
    padded[mask.bool()] = row[0]
    out = model(padded, attention_mask=mask, use_cache=True)
    plain = model(row, use_cache=True)
    torch.testing.assert_close(out.logits[mask.bool()], plain.logits[0], **CLOSE)
    # the text goes on, by one token and by several, and with padding once more
    whole = torch.cat([mask, torch.tensor([[1, 1, 0, 1]])], dim=1)
    more = ids[:1, 5:9]
    parts = [
        model(more[:, :1], attention_mask=whole[:, :9], cache=cache_of(out)).logits,
        model(more[:, 1:], attention_mask=whole, cache=cache_of(out)).logits,
    ]
    expected = model(torch.cat([row, more[:, [0, 1, 3]]], dim=1)).logits[:, 5:]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, [0, 1, 3]], expected, **CLOSE)


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_a_padded_step_passes_state_and_gradient_on(linear):
    torch.manual_seed(0)
    mixer = MLGRU(8, linear=linear)
    x = torch.randn(2, 5, 8, requires_grad=True)
    state = torch.randn(2, 8, requires_grad=True)
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]])
    last = mixer.step(x, mask, torch.full((8,), 0.1), state)[1]
    rows = [
        mixer.step(x[r : r + 1, mask[r].bool()], None, torch.full((8,), 0.1), state[r : r + 1])
        for r in range(2)
    ]
    plain = torch.cat([row[1] for row in rows])
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-6)
    weight = torch.randn_like(last)
    ours = torch.autograd.grad((last * weight).sum(), [x, state], retain_graph=True)
    theirs = torch.autograd.grad((plain * weight).sum(), [x, state])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not ours[0][mask == 0].any()


@pytest.mark.parametrize("steps", [3, 40, 130])
def test_the_gate_at_left_padding_changes_no_bit_of_the_states(steps):
    torch.manual_seed(steps)
    i, f = torch.randn(2, steps, 4), torch.rand(2, steps, 4)
    real = torch.arange(steps)[None, :, None] >= torch.tensor([steps // 3, 2])[:, None, None]
    i = i * real
    some, _ = mlgru_scan(i, f)
    one, _ = mlgru_scan(i, torch.where(real, f, 1.0))
    assert torch.equal(some, one)
