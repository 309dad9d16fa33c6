"""A teacher's distribution among the targets, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from straight_through import bit_linear
from torch import Tensor

from nomatmul.ops.bitlinear import new_slot
from nomatmul.ops.loss import (
    Taught,
    TeacherLogits,
    linear_cross_entropy,
    mixed_cross_entropy,
    naive,
)

EPS = 1e-5


def reference(logits, taught, targets, share, temperature):
    """(objective, z, loss, divergence), means over the targets that count, all logits at once."""
    counted = targets != -100
    count = counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
    log_t = torch.log_softmax(taught[:, : logits.shape[1]] / temperature, -1)
    log_p = torch.log_softmax(logits / temperature, -1)
    divergence = F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(-1)
    divergence = (divergence * counted).sum() / count
    z = (logits.logsumexp(-1).square() * counted).sum() / count
    return (1 - share) * loss + share * temperature**2 * divergence, z, loss, divergence


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 7),
    vocabulary=st.integers(2, 19),
    padded=st.integers(0, 5),
    chunk=st.integers(0, 10),
    ternary=st.booleans(),
    full=st.booleans(),
    share=st.sampled_from((0.0, 0.3, 1.0)),
    temperature=st.sampled_from((1.0, 0.5, 3.0)),
    z_share=st.sampled_from((0.0, 0.1)),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_autograd(
    tokens, width, vocabulary, padded, chunk, ternary, full, share, temperature, z_share, seed
):
    torch.manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.double, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.double, requires_grad=True)
    norm = (1 + torch.rand(width, dtype=torch.double)).requires_grad_()
    taught = 3 * torch.randn(tokens, vocabulary + padded, dtype=torch.double)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[torch.rand(tokens) < 0.2] = -100
    teacher = TeacherLogits(lambda part, _: taught[part])
    options = {"norm": norm, "slot": new_slot(), "eps": EPS} if ternary else {}
    if ternary:
        options["full_precision"] = full
    ours = mixed_cross_entropy(
        x, targets, weight, chunk=chunk,
        taught=Taught(teacher.number, share, temperature), **options,
    )  # fmt: skip
    logits = bit_linear(x, weight, norm, EPS, full) if ternary else x @ weight.T
    exact = reference(logits, taught, targets, share, temperature)
    for value, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)
    inputs = [x, weight, *([norm] if ternary else [])]
    scale = 1.7
    mine = torch.autograd.grad((ours.total + z_share * ours.z) * scale, inputs)
    theirs = torch.autograd.grad((exact[0] + z_share * exact[1]) * scale, inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not ours.loss.requires_grad
    assert not ours.divergence.requires_grad


def test_a_share_of_nothing_is_the_plain_loss():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    targets = torch.randint(0, 13, (2, 5))
    teacher = TeacherLogits(lambda part, _: torch.randn(10, 13)[part])
    mixed = mixed_cross_entropy(x, targets, weight, taught=Taught(teacher.number, 0.0))
    plain, z = linear_cross_entropy(x, targets, weight)
    assert mixed.total == mixed.loss == plain
    assert mixed.z == z
    ours = torch.autograd.grad(mixed.total, (x, weight))
    for a, b in zip(ours, torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_student_that_agrees_has_nothing_to_learn():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(13, 8)
    teacher = TeacherLogits(lambda part, _: (x @ weight.T).detach()[part])
    targets = torch.randint(0, 13, (6,))
    taught = Taught(teacher.number, 1.0, 2.0)
    mixed = mixed_cross_entropy(x, targets, weight, taught=taught, chunk=4)
    assert mixed.divergence == pytest.approx(0, abs=1e-6)
    assert mixed.loss > 0.1
    (gradient,) = torch.autograd.grad(mixed.total, (x,))
    assert gradient.abs().max() < 1e-6


def test_tokens_that_a_teacher_rules_out_make_no_nan():
    """Padded entries of a vocabulary often have logits of -inf, in float16 and bfloat16, too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, taught = torch.randn(2, 5), torch.randn(2, 5)
        taught[:, 2:4] = float("-inf")
        one = torch.ones(())
        targets = torch.tensor([2, 0])
        rows = naive.mixed_rows(
            logits, taught.to(dtype), targets, -100, 0.5, 1.5, one, 0 * one, True
        )
        for value in rows:
            assert value.isfinite().all()


def test_no_logits_outlive_their_chunk():
    """Of the teacher no more than a chunk is asked for at once, each exactly once in training."""
    asked: list[tuple[int, int]] = []

    def logits(part: slice, student: Tensor) -> Tensor:
        assert student.shape == (len(range(10)[part]), 13)
        asked.append((part.start, min(part.stop, 10)))
        return torch.zeros(len(range(10)[part]), 13)

    teacher = TeacherLogits(logits)
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(13, 8)
    mixed = mixed_cross_entropy(
        x, torch.zeros(10, dtype=torch.long), weight, chunk=4, taught=Taught(teacher.number, 0.5)
    )
    mixed.total.backward()
    assert asked == [(0, 4), (4, 8), (8, 10)]


def test_autocast_makes_products_of_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(50, 32) / 4
    weight.requires_grad_()
    taught = torch.randn(64, 50)
    targets = torch.randint(0, 50, (64,))
    teacher = TeacherLogits(lambda part, _: taught[part].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours = mixed_cross_entropy(x, targets, weight, taught=Taught(teacher.number, 0.5, 2.0))
    exact = reference(x @ weight.T, taught, targets, 0.5, 2.0)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total, exact[0], rtol=2e-2, atol=0)
    mine = torch.autograd.grad(ours.total, (x, weight))
    for a, b in zip(mine, torch.autograd.grad(exact[0], (x, weight)), strict=True):
        assert (a - b).norm() / b.norm() < 2e-2


def test_operator_obeys_torchs_rules_and_compiles():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    norm, taught = torch.ones(6, requires_grad=True), torch.randn(5, 9)
    targets, one = torch.tensor([0, 3, -100, 8, 1]), torch.ones(())
    teacher = TeacherLogits(lambda part, _: taught[part])
    mix = (teacher.number, 0.5, 2.0)
    for kind, slot in ((None, -1), (norm, new_slot())):
        args = (
            x,
            targets,
            weight,
            kind,
            one,
            0 * one,
            1e-6,
            2,
            -100,
            slot,
            torch.float32,
            kind is not None,
            True,
        )
        torch.library.opcheck(
            torch.ops.nomatmul.linear_cross_entropy.default,
            (*args, *mix),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return mixed_cross_entropy(x * 2, targets, weight, taught=Taught(*mix)).total

    compiled = torch.compile(loss, dynamic=False, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        ours = torch.autograd.grad(compiled(x, targets), (x, weight))
        for a, b in zip(ours, torch.autograd.grad(loss(x, targets), (x, weight)), strict=True):
            torch.testing.assert_close(a, b)
        taught.copy_(torch.randn(5, 9))  # the teacher has looked at other tokens


def test_shapes_that_disagree_are_refused():
    x, weight = torch.zeros(3, 8), torch.zeros(13, 8)
    teacher = TeacherLogits(lambda part, _: torch.zeros(3, 13)[part])
    targets = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="does not fit targets"):
        mixed_cross_entropy(x, targets, weight, taught=Taught(teacher.number, 0.5))
