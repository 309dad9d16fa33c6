"""The learning rate over a run."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nomatmul.train import TrainConfig
from nomatmul.train.schedule import learning_rate


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config, s, s / config.steps) for s in range(config.steps + 1)]


def test_published_schedule_is_a_cosine_whose_peak_is_halved_midway(config: TrainConfig) -> None:
    config = dataclasses.replace(config, steps=100, warmup_steps=0, learning_rate=1.0)
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
