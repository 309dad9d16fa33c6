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
from studies.recipes.chunks import LOWEST, UnitInverse, recur, unit_inverse
from studies.recipes.recurrences import MIXERS
from studies.recipes.second import one
from studies.recipes.switches import ternary_groups
from studies.recipes.trainer import ChangedTrainer

B, T, H, K, V = 2, 128, 3, 8, 16


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stepwise(q: Tensor, k: Tensor, v: Tensor, log: Tensor, look: Tensor | None = None) -> Tensor:
    """The definition, a step at a time; look: of the delta rule."""
    state, out = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=v.dtype), []
    for t in range(k.shape[1]):
        k_1, v_1 = k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2)
        if look is not None:
            v_1 = v_1 - look[:, t].unsqueeze(-2) @ state
        state = state * log[:, t].exp().unsqueeze(-1) + k_1 * v_1
        out.append((state * q[:, t].unsqueeze(-1)).sum(2))
    return torch.stack(out, 1)


@pytest.mark.parametrize(("width", "lowest"), [(1, -90.0), (K, LOWEST)])
@pytest.mark.parametrize("delta", [False, True])
def test_chunks_are_the_recurrence(width: int, lowest: float, delta: bool) -> None:
    torch.manual_seed(0)
    q, k, v = drawn(B, T, H, K), F.normalize(drawn(B, T, H, K), dim=-1), drawn(B, T, H, V)
    log = LOWEST * torch.rand(B, T, H, width, dtype=torch.float64)
    log[0, 5] = lowest  # a gate that forgets everything, or as much as it may
    rate = torch.rand(B, T, H, K, dtype=torch.float64)
    look = k * log.exp() if delta else None
    expected = stepwise(q, k * rate, v, log, look)
    assert torch.allclose(recur(q, k * rate, v, log, look), expected, rtol=1e-8, atol=1e-8)


def test_the_delta_rule_stays_small_where_keys_are_alike() -> None:
    """The powers of its matrix reach 1e17 there, and float32 products of them are noise."""
    torch.manual_seed(0)
    key = F.normalize(torch.randn(1, 1, 1, 32), dim=-1)
    k = F.normalize(key + 1e-3 * torch.randn(1, 256, 1, 32), dim=-1)
    q, v, log = torch.randn(1, 256, 1, 32), torch.randn(1, 256, 1, V), torch.zeros(1, 256, 1, 1)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y = recur(*inputs, log, inputs[1])
    expected = stepwise(*(t.detach().double() for t in (q, k, v, log, k)))
    assert (y - expected).abs().max() < 1e-3 * expected.abs().max()
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() < 1e4 for t in inputs)


def test_an_inverse_has_the_gradient_of_one() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 16, 16, dtype=torch.float64).tril(-1)
    eye = torch.eye(16, dtype=torch.float64)
    assert torch.allclose(unit_inverse(a) @ (eye + a), eye.expand(2, -1, -1), atol=1e-9)
    small = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: UnitInverse.apply(x.tril(-1)), small)


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
