"""Training steps replayed as CUDA graphs leave the same weights as launched ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nomatmul.models import CausalLM, CausalLMConfig
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.ops.loss import Taught, TeacherLogits
from nomatmul.train.micro_step import GraphedMicroStep, MicroStep

pytestmark = pytest.mark.gpu

STEPS, ACCUMULATION = 5, 3


def _train(
    graphed: bool, waits: bool = False, full: int = 0, taught: bool = False
) -> tuple[list[torch.Tensor], list[float], MicroStep]:
    """Weights after a few steps on the same batches, and each micro-batch's loss.

    full: steps in which weights are not rounded. taught: by a teacher, whose hidden states of each
    micro-batch come to lie at one address.
    """
    torch.manual_seed(3)
    sizes = {"vocab_size": 300, "hidden_size": 96, "num_layers": 3, "intermediate_size": 200}
    model = CausalLM(CausalLMConfig(**sizes)).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    batches = torch.randint(0, 300, (STEPS * ACCUMULATION, 2, 65), device="cuda")

    states = torch.randn(len(batches), 128, 32, device="cuda", dtype=torch.bfloat16)
    hidden, head = torch.empty_like(states[0]), torch.randn_like(states[0, 0].expand(310, 32))
    teacher = TeacherLogits(lambda part, _: (hidden[part] @ head.t())[:, :300])

    def loss(x_BT, y_BT):
        with torch.autocast("cuda", torch.bfloat16):
            if taught:
                told = Taught(teacher.number, 0.5, 2.0)
                total, z, plain, divergence = model.loss(x_BT, y_BT, chunk=50, taught=told)
                return total, z, None, plain, divergence
            value, z = model.loss(x_BT, y_BT, chunk=50)
        if waits:
            value.item()  # a graph cannot hold a wait for the device
        return value, z

    losses = []
    model.set_full_precision(full > 0)
    with ternary_cache() as cache:
        step = MicroStep(loss, 0.1)
        if graphed:
            step = GraphedMicroStep(loss, 0.1, cache.clear)
        for number, ids_BT in enumerate(batches):
            first = number % ACCUMULATION == 0
            if number == full * ACCUMULATION > 0:
                model.set_full_precision(False)
                cache.clear()
                step.forget()
            weight = torch.tensor((1.0 + 0.1 * number) / ACCUMULATION, device="cuda")
            hidden.copy_(states[number])
            value = step(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), weight, first)
            losses.append(float(value) + sum(map(float, step.beside.values())))
            if number % ACCUMULATION == ACCUMULATION - 1:
                optimizer.step()
                cache.clear()
                step.end(optimizer)
    return [p.detach().clone() for p in model.parameters()], losses, step


@pytest.mark.parametrize("taught", [False, True])
def test_graphs_train_the_same_weights(monkeypatch: pytest.MonkeyPatch, taught: bool) -> None:
    monkeypatch.setenv("NOMATMUL_OPS", "triton")
    expected, losses, _ = _train(graphed=False, taught=taught)
    weights, found, step = _train(graphed=True, taught=taught)
    assert isinstance(step, GraphedMicroStep)
    assert set(step.graphs) == {True, False}  # the first micro-batch and the others
    assert found == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_step_is_recorded_anew_where_full_precision_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fourth step is launched and makes its kernels, the fifth one is replayed."""
    monkeypatch.setenv("NOMATMUL_OPS", "triton")
    expected, losses, _ = _train(graphed=False, full=3)
    weights, found, step = _train(graphed=True, full=3)
    assert isinstance(step, GraphedMicroStep)
    assert set(step.graphs) == {True, False}
    assert found == losses
    assert losses[3 * ACCUMULATION :] != _train(graphed=False)[1][3 * ACCUMULATION :]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_step_that_cannot_be_recorded_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMATMUL_OPS", "triton")
    expected, losses, _ = _train(graphed=False)
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        weights, found, _ = _train(graphed=True, waits=True)
    assert found == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert torch.randn(8, device="cuda").isfinite().all()  # random numbers are still drawn
