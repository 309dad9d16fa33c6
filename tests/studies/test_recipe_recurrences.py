"""Other recurrences and scales of groups in the recipe study, against their definitions."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from studies.compare.cell import run_cell
from studies.recipes.cells import Amount, build
from studies.recipes.change import Change
from studies.recipes.recurrences import MIXERS, decayed, delta_rule
from studies.recipes.second import one
from studies.recipes.switches import ternary_groups
from studies.recipes.trainer import ChangedTrainer

B, T, H, K, V = 2, 128, 3, 8, 16


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stepwise(q: Tensor, k: Tensor, v: Tensor, log: Tensor, b: Tensor | None) -> Tensor:
    """The definitions, a step at a time; b: of the delta rule."""
    state, out = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        k_1, v_1 = k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2)
        state = state * log[:, t].exp().unsqueeze(-1)
        if b is not None:
            v_1 = b[:, t, :, None, None] * (v_1 - k_1.transpose(-1, -2) @ state)
        state = state + k_1 * v_1
        out.append((state * q[:, t].unsqueeze(-1)).sum(2))
    return torch.stack(out, 1)


@pytest.mark.parametrize("width", [1, K])
def test_chunks_of_decays_are_the_recurrence(width: int) -> None:
    torch.manual_seed(0)
    q, k, v = drawn(B, T, H, K), drawn(B, T, H, K), drawn(B, T, H, V)
    log = -3 * torch.rand(B, T, H, width, dtype=torch.float64)
    log[0, 5] = -90  # a gate that forgets everything
    expected = stepwise(q, k, v, log.expand(-1, -1, -1, K), None)
    assert torch.allclose(decayed(q, k, v, log), expected, rtol=1e-9, atol=1e-9)


def test_chunks_of_the_delta_rule_are_the_recurrence() -> None:
    torch.manual_seed(0)
    q, k, v = drawn(B, T, H, K), F.normalize(drawn(B, T, H, K), dim=-1), drawn(B, T, H, V)
    log, b = -torch.rand(B, T, H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    expected = stepwise(q, k, v, log.unsqueeze(-1).expand(-1, -1, -1, K), b)
    assert torch.allclose(delta_rule(q, k, v, log, b, 32), expected, rtol=1e-8, atol=1e-8)


def test_groups_have_a_scale_each_and_the_last_one_may_be_short() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 5, 100)
    got = ternary_groups(w, 64)
    for part in (slice(0, 64), slice(64, 100)):
        scale = w[..., part].abs().mean(-1, keepdim=True)
        expected = (w[..., part] / scale).round().clamp(-1, 1) * scale
        assert torch.allclose(got[..., part], expected)


@pytest.fixture(scope="module")
def work(recipe_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(recipe_work, tmp_path_factory.mktemp("recurrences") / "work")


@functools.cache
def ran(work: Path, change: Change) -> dict[str, Any]:
    amount = Amount(tiny=True, seeds=(1,))
    cell = build(one(amount, "test", "run", "label", change=change), amount, work, work / "r.jsonl")
    (row,) = run_cell(cell, trainer_type=ChangedTrainer)
    return row


@pytest.mark.parametrize("change", [Change(group=64), *(Change(mixer=name) for name in MIXERS)])
def test_every_change_trains(work: Path, change: Change) -> None:
    row, base = ran(work, change), ran(work, Change())
    assert row["status"] == "ok"
    assert row["change"] == change.to_dict()
    assert row["loss"] < 8  # an untrained one has 9
    assert row["loss"] != base["loss"]
