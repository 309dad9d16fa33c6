"""What an encoder must guess: counts, shares, and dependence on (seed, sample) only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from nomatmul.train.batches import Batches, Slice, WindowOrder, held_out_masked
from nomatmul.train.masking import Masking, hash_words
from nomatmul.train.plan import DevicePlan
from nomatmul.train.tokens import TokenStream

CPU = DevicePlan(torch.device("cpu"))
MASK, VOCABULARY = 5, 1000
MASKING = Masking(count=32, mask_id=MASK, vocabulary=VOCABULARY, seed=3)


def stream(length: int) -> TokenStream:
    ids = (np.arange(length) % 900 + 50).astype(np.uint16)
    return TokenStream((ids[:7], ids[7:]), Tokenizer(models.BPE()), "", 0, length, None)


def test_a_quarter_is_hidden_in_the_authors_shares() -> None:
    ids_BT = torch.randint(50, 950, (2000, 128), generator=torch.Generator().manual_seed(0))
    x_BT, y_BT = MASKING(ids_BT, torch.arange(2000))
    hidden = y_BT != -100
    assert (hidden.sum(1) == 32).all()
    assert torch.equal(y_BT[hidden], ids_BT[hidden])
    assert torch.equal(x_BT[~hidden], ids_BT[~hidden])
    masked, kept = x_BT == MASK, hidden & (x_BT == ids_BT)
    assert (masked.sum(1) >= 26).all()  # round(0.8 x 32), and a random word may be the mask's id
    assert (masked.sum(1) == 26).float().mean() > 0.98
    assert kept.sum(1).float().mean() == pytest.approx(3, abs=0.05)  # 32 - round(0.9 x 32)
    words = x_BT[hidden & ~masked & ~kept]
    assert words.float().mean() == pytest.approx(VOCABULARY / 2, rel=0.03)
    assert (words.min() < 20, words.max() > 980) == (True, True)


def test_every_position_is_hidden_equally_often() -> None:
    _, y_BT = MASKING(torch.full((4000, 128), 7), torch.arange(4000))
    share_T = (y_BT != -100).double().mean(0)
    deviation = (0.25 * 0.75 / 4000) ** 0.5
    assert (share_T - 0.25).abs().max() < 4.5 * deviation
    # neighbours are hidden independently of each other
    both = ((y_BT[:, 1:] != -100) & (y_BT[:, :-1] != -100)).double().mean()
    assert both == pytest.approx(32 / 128 * 31 / 127, abs=0.002)


def test_masks_depend_on_seed_and_sample_only() -> None:
    ids_BT = torch.full((64, 128), 7)
    whole = MASKING(ids_BT, torch.arange(64))
    part = MASKING(ids_BT[:10], torch.arange(20, 30))
    assert all(torch.equal(a[20:30], b) for a, b in zip(whole, part, strict=True))
    other = Masking(32, MASK, VOCABULARY, seed=4)(ids_BT, torch.arange(64))
    assert not torch.equal(whole[1], other[1])
    assert len({tuple(row.tolist()) for row in whole[1]}) == 64
    far = hash_words(3, torch.tensor([1, 1 + (1 << 40)]), 128, 0)
    assert not torch.equal(far[0], far[1])


def test_hashes_are_frozen() -> None:
    """A run that is continued by another version must hide the same tokens."""
    assert hash_words(1, torch.tensor([0, 123456789012]), 3, 0).tolist() == FROZEN


def test_batches_hide_by_sample_number_on_any_number_of_ranks() -> None:
    data, order = stream(500), WindowOrder(500, 16, 0)
    masking = Masking(4, MASK, VOCABULARY, 0)
    whole = Batches(data, order, 4, CPU, None, masking).run(8)
    want = [next(whole) for _ in range(3)]
    parts = [Batches(data, order, 2, CPU, Slice(4, rank, 2), masking).run(8) for rank in range(2)]
    for x_BT, y_BT in want:
        assert x_BT.shape == y_BT.shape == (4, 16)
        assert ((y_BT != -100).sum(1) == 4).all()
        pairs = [next(part) for part in parts]
        assert torch.equal(torch.cat([x for x, _ in pairs]), x_BT)
        assert torch.equal(torch.cat([y for _, y in pairs]), y_BT)


def test_held_out_windows_are_the_same_for_every_seed() -> None:
    data = stream(100)
    results = []
    for seed in (0, 1):
        masking = Masking(4, MASK, VOCABULARY, seed)
        results.append(list(held_out_masked(data, 16, 4, 1000, masking, CPU.device)))
    assert sum(count for _, _, count in results[0]) == 6 * 4  # 6 whole windows
    for (x, y, count), (x2, y2, _) in zip(*results, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert count == int((y != -100).sum())
    with pytest.raises(ValueError, match="sequence_length 128 is too long for 100 held-out"):
        next(held_out_masked(data, 128, 1, 10, Masking(4, MASK, VOCABULARY, 0), CPU.device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_hides_what_a_cpu_hides() -> None:
    ids_BT, samples = torch.randint(50, 950, (64, 128)), torch.arange(1 << 33, (1 << 33) + 64)
    for a, b in zip(MASKING(ids_BT, samples), MASKING(ids_BT.cuda(), samples.cuda()), strict=True):
        assert torch.equal(a, b.cpu())


FROZEN = [[2873539044, 2432991218, 63021219], [2183544545, 2154921186, 2239229999]]
