"""The learning rate over a run."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nomatmul.train import TrainConfig
from nomatmul.train.schedule import batch_size, learning_rate


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config, s, s / config.steps) for s in range(config.steps + 1)]


def test_published_schedule_is_a_cosine_whose_peak_is_halved_midway(config: TrainConfig) -> None:
    config = dataclasses.replace(
        config, steps=100, warmup_steps=0, learning_rate=1.0, schedule="cosine_halved"
    )
    got = rates(config)
    assert got[0] == 1.0
    assert got[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.49)))
    assert got[50] == pytest.approx(0.25)
    assert got[49] / got[50] > 2
    assert got[100] == pytest.approx(0.0, abs=1e-12)


def test_warm_up_is_linear_and_ends_on_the_plain_curve(config: TrainConfig) -> None:
    config = dataclasses.replace(config, warmup_steps=4, schedule="constant", learning_rate=8.0)
    assert rates(config)[:6] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_final_rate_is_a_floor(config: TrainConfig, schedule: str) -> None:
    config = dataclasses.replace(
        config, warmup_steps=0, schedule=schedule, final_rate=0.1, learning_rate=1.0
    )
    got = rates(config)
    assert (got[0], got[-1]) == (1.0, pytest.approx(0.1))
    assert got == sorted(got, reverse=True)


def test_progress_beyond_the_end_stays_at_the_end(config: TrainConfig) -> None:
    assert learning_rate(config, 500, 1.7) == learning_rate(config, 500, 1.0)


def test_triangle_is_the_authors_budget_triangle2(config: TrainConfig) -> None:
    """min(0.25 + x, 4 (1 - x)): their base_percentage 0.25 and falloff 0.25."""
    config = dataclasses.replace(
        config, steps=8, warmup_steps=0, schedule="triangle", learning_rate=1.0
    )
    assert rates(config) == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 0.5, 0.0])


def test_the_batch_grows_in_a_line_by_micro_batches(config: TrainConfig) -> None:
    config = dataclasses.replace(config, batch_size=16, micro_batch_size=2, batch_ramp=0.5)
    sizes = [batch_size(config, step / 16, 2) for step in range(17)]
    assert sizes == [2, 4, 6, 8, 10, 12, 14, 16, *[16] * 9]
    assert [batch_size(config, step / 16, 8) for step in range(9)] == [8] * 4 + [16] * 5
    plain = dataclasses.replace(config, batch_ramp=0.0)
    assert {batch_size(plain, step / 16, 2) for step in range(17)} == {16}
