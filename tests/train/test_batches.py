"""Batches are a pure function of (seed, step)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from nomatmul.train.batches import Batches, WindowOrder, held_out_batches
from nomatmul.train.plan import DevicePlan, plan_device
from nomatmul.train.tokens import TokenStream

CPU = DevicePlan(torch.device("cpu"))


def stream(length: int, dtype: type = np.uint16) -> TokenStream:
    ids = np.arange(length).astype(dtype)
    return TokenStream((ids[:7], ids[7:]), Tokenizer(models.BPE()), "", 0, length, None)


def test_an_epoch_visits_every_window_once() -> None:
    order = WindowOrder(103, 10, seed=3)
    assert order.windows == 9
    for epoch in range(3):
        starts = order.starts(epoch * 9, 9)
        assert len(set(starts.tolist())) == 9
        assert set(np.diff(np.sort(starts))) == {10}
        assert starts.min() >= 0
        assert starts.max() + 10 < 103
    assert order.starts(0, 9).tolist() != (order.starts(9, 9)).tolist()


def test_the_order_depends_on_seed_and_position_only() -> None:
    order, again = WindowOrder(1000, 16, seed=1), WindowOrder(1000, 16, seed=1)
    whole = order.starts(0, 200)
    for first, count in ((0, 3), (150, 50), (55, 13), (60, 70)):
        assert again.starts(first, count).tolist() == whole[first : first + count].tolist()
    assert WindowOrder(1000, 16, seed=2).starts(0, 200).tolist() != whole.tolist()


def test_targets_are_the_inputs_shifted_by_one() -> None:
    data = stream(200)
    batches = Batches(data, WindowOrder(200, 8, 0), 3, CPU).run(0)
    for x_BT, y_BT in itertools.islice(batches, 5):
        assert x_BT.shape == y_BT.shape == (3, 8)
        assert (x_BT + 1 == y_BT).all()


def test_batches_can_begin_anywhere() -> None:
    data = stream(500)
    make = lambda first: Batches(data, WindowOrder(500, 8, 0), 4, CPU).run(first)  # noqa: E731
    whole = [x for x, _ in itertools.islice(make(0), 30)]
    later = [x for x, _ in itertools.islice(make(4 * 17), 13)]
    assert all(torch.equal(a, b) for a, b in zip(whole[17:], later, strict=True))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_device_path_reads_large_ids(dtype: type) -> None:
    from nomatmul.train.batches import _signed, _unsigned

    high = 65_535 if dtype is np.uint16 else 2**31 + 5
    ids = np.asarray([0, 40_000, high], dtype=dtype)
    assert _unsigned(_signed(ids)).tolist() == [0, 40_000, high]


def test_held_out_batches_predict_every_token_once() -> None:
    data = stream(100)
    seen, total = [], 0
    for x_BT, y_BT, count in held_out_batches(data, 8, 3, 1_000, CPU.device):
        assert x_BT.shape == y_BT.shape == (3, 8)
        valid = y_BT != -100
        assert (x_BT[valid] + 1 == y_BT[valid]).all()
        assert count == int(valid.sum())
        seen += y_BT[valid].tolist()
        total += count
    assert seen == list(range(1, 100))
    assert total == 99
    assert sum(count for _, _, count in held_out_batches(data, 8, 3, 50, CPU.device)) == 50


def test_data_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length 64 is too long for data of 100 tokens"):
        WindowOrder(100, 64, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_batches_equal_host_batches(tmp_path: Path) -> None:
    data, plan = stream(5000), plan_device(torch.device("cuda"))
    order = WindowOrder(5000, 32, 0)
    host = Batches(data, order, 4, CPU)._from_host(8)
    resident = Batches(data, order, 4, plan).run(8)
    threaded = Batches(data, order, 4, plan)._from_thread(8)
    for _ in range(200):
        x, y = next(host)
        for other in (next(resident), next(threaded)):
            assert torch.equal(other[0].cpu(), x)
            assert torch.equal(other[1].cpu(), y)
    threaded.close()
