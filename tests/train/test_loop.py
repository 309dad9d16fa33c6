"""The training loop by itself: hooks, end, weights; and what a device is planned for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from train_jobs import tiny_config

from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train.loop import Hook, Loop, MicroBatch, every
from nomatmul.train.micro_step import MicroStep
from nomatmul.train.plan import DevicePlan, plan_device, plan_training

CUDA = torch.device("cuda")  # planned for, never used


def make_loop(step: int = 0, clip_norm: float | None = None) -> Loop:
    """A loop over y = w x with squared error, by plain gradient descent."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)

    def loss(x_BK: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        value = (model(x_BK)[:, 0] - y_B).square().mean()
        return value, value

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Loop(
        model, optimizer, MicroStep(loss), ternary_cache(),
        rate=lambda step, share: 0.1 * (1 - share), clip_norm=clip_norm, step=step,
    )  # fmt: skip


def batch(step: int, share: float) -> list[MicroBatch]:
    random = torch.Generator().manual_seed(step)
    x_BK, y_B = torch.randn(4, 3, generator=random), torch.randn(4, generator=random)
    return [(x_BK, y_B, torch.ones(()))]


def train(loop: Loop, steps: int, until: int | None = None) -> bool:
    stop = lambda: loop.step == until  # noqa: E731
    return loop.run(lambda: loop.step / steps, batch, [], stop)


def test_a_loop_that_starts_at_a_step_goes_on_as_if_never_stopped() -> None:
    whole, first = make_loop(), make_loop()
    assert train(whole, 9)
    assert not train(first, 9, until=4)
    assert first.step == 4
    second = make_loop(step=4)
    second.model.load_state_dict(first.model.state_dict())
    assert train(second, 9)
    assert torch.equal(whole.model.weight, second.model.weight)
    assert not torch.equal(whole.model.weight, first.model.weight)


def test_hooks_run_when_due_and_once_at_the_end() -> None:
    loop, seen = make_loop(), []
    hooks = [
        Hook(every(3), lambda result: seen.append(("end", loop.step)), at_end=True),
        Hook(every(2), lambda result: seen.append(("two", loop.step))),
        Hook(every(0), lambda result: seen.append(("never", loop.step))),
    ]
    assert loop.run(lambda: loop.step / 7, batch, hooks)
    assert seen == [("two", 2), ("end", 3), ("two", 4), ("end", 6), ("two", 6), ("end", 7)]
    loop, seen = make_loop(), []
    assert not loop.run(lambda: loop.step / 7, batch, hooks, stop=lambda: loop.step == 4)
    assert seen[-1] == ("two", 4)  # what is for the end waits for it


def test_micro_batches_count_by_their_weights() -> None:
    whole, cut = make_loop(clip_norm=0.0), make_loop(clip_norm=0.0)
    ((x_BK, y_B, one),) = batch(0, 0.0)
    expected = whole.take_step([(x_BK, y_B, one)], 0.0)
    parts = [(x_BK[:3], y_B[:3], one * 1.5), (x_BK[3:], y_B[3:], one * 0.5)]
    found = cut.take_step(parts, 0.0)
    for a, b in ((found.loss, expected.loss), (found.norm, expected.norm)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(cut.model.weight, whole.model.weight)
    assert torch.equal(found.inputs, x_BK[3:])
    assert found.rate == expected.rate == 0.1
    assert make_loop().take_step(parts, 0.0).norm is None


@pytest.mark.parametrize(
    ("changes", "kernels", "many", "compiled", "graph"),
    [
        ({}, "triton", False, None, True),
        ({}, "triton", True, None, False),
        ({}, "naive", False, "default", False),
        ({"compile": "on"}, "triton", False, "default", False),
        ({"compile": "max-autotune"}, "triton", True, "max-autotune", False),
        ({"compile": "graph"}, "naive", False, None, True),
        ({"compile": "off"}, "triton", False, None, False),
    ],
)
def test_a_gpu_is_planned_for_the_model(
    changes: dict, kernels: str, many: bool, compiled: str | None, graph: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NOMATMUL_OPS", kernels)
    config = tiny_config(precision="bfloat16", **changes)
    plan = plan_training(config, CUDA, many)
    assert (plan.compile, plan.graph, plan.bfloat16) == (compiled, graph, True)
    assert plan.memory == "device"
    assert plan.fused_adamw
    dense = dataclasses.replace(
        config.model, token_mixer="attention", linear="dense", num_heads=2, channel_mixer="glu"
    )
    if not changes:
        plan = plan_training(dataclasses.replace(config, model=dense), CUDA, many)
        assert (plan.compile, plan.graph) == ("default", False)


def test_a_cpu_is_planned_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomatmul.train.plan.usable_cpus", lambda: 1)
    device = torch.device("cpu")
    plan = plan_training(tiny_config(deterministic=False), device)
    assert plan == DevicePlan(device, threads=1)
    assert plan_device(device, "bfloat16").bfloat16
    for many in (False, True):
        with pytest.raises(ValueError, match="compile 'graph' records CUDA graphs: it needs one"):
            plan_training(tiny_config(compile="graph"), device, many)
    with pytest.raises(ValueError, match="it needs one GPU and one process"):
        plan_training(tiny_config(compile="graph", precision="float32"), CUDA, many=True)
