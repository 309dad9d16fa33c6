"""Every epilogue of the row unit against the reference, with stalls and in any order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.ports import Epilogue
from tests.hardware.row_bench import SLOTS, Job, check

DESIGN = Design(lanes=32, element_lanes=4, vector_words=256, parameter_words=64, state_words=64)
WIDER_STATE = Design(
    lanes=32,
    element_lanes=8,
    vector_words=256,
    parameter_words=64,
    state_words=64,
    vector_bits=20,
    vector_fraction=9,
    state_bits=20,
    state_fraction=13,
    table_bits=7,
)
SMALL = {"vector_words": 256, "state_words": 64}


def sums_of(rng: random.Random, design: Design, elements: int, slots: int) -> list[list[int]]:
    """Of every size, with extremes and zeros."""
    least, most = -(1 << (design.sum_bits - 1)), (1 << (design.sum_bits - 1)) - 1
    return [
        [
            rng.choice([0, least, most, rng.randint(least, most) >> rng.randrange(24)])
            if rng.random() < 0.2
            else rng.randint(-(1 << 14), 1 << 14)
            for _ in range(slots)
        ]
        for _ in range(elements)
    ]


def job_of(
    rng: random.Random,
    design: Design,
    epilogue: Epilogue,
    elements: int,
    *,
    right: int | None = None,
    u_shift: int | None = None,
) -> Job:
    """A random command; `right` is the shift of all slots, or each has one of its own."""
    slots = SLOTS.get(epilogue, 1)
    fraction = rng.choice([0, design.vector_fraction, 20, -3])
    scalars = []
    for _ in range(slots):
        m = rng.choice([1 << 23, (1 << 24) - 1, rng.randrange(1 << 23, 1 << 24)])
        # about 2^14 * 2^18 >> s, from whole numbers of a few to saturation
        s = rng.randint(14, 20) if right is None else right
        scalars.append((m, -s - 6 - fraction))
    if rng.random() < 0.1:
        scalars[0] = (0, 0)
    return Job(
        epilogue,
        sums_of(rng, design, elements, slots),
        scalars,
        fraction=fraction,
        u_shift=rng.choice([1, 7, design.vector_fraction, 23]) if u_shift is None else u_shift,
        dst=rng.randrange(64),
        dst2=rng.randrange(128, 192),
        aux=rng.randrange(32),
        lb=rng.randrange(32),
        bounded=rng.randrange(2),
        fresh=rng.random() < 0.3,
    )


def with_residual_in_place(rng: random.Random, job: Job) -> Job:
    """The residual is read where it is written, or apart from it."""
    if job.epilogue == Epilogue.ADD:
        job.aux = job.dst if rng.random() < 0.7 else 64 + rng.randrange(96)
    return job


@pytest.mark.parametrize("design", [DESIGN, WIDER_STATE], ids=["default", "wider-state"])
@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda kind: kind.name.lower())
def test_epilogue_equals_the_reference(epilogue: Epilogue, design: Design) -> None:
    rng = random.Random(f"{epilogue} {design.vector_bits}")
    jobs = [
        with_residual_in_place(rng, job_of(rng, design, epilogue, rng.randint(1, 30)))
        for _ in range(6)
    ]
    check(design, jobs, seed=rng.randrange(1000))


@pytest.mark.parametrize("right", [-600, -31, -7, -6, 0, 1, 62, 63, 400])
def test_shifts_at_both_ends(right: int) -> None:
    rng = random.Random(right)
    jobs = [
        with_residual_in_place(rng, job_of(rng, DESIGN, epilogue, 6, right=right))
        for epilogue in Epilogue
    ]
    for job in jobs:
        limits = [(m, max(-512, min(511, e))) for m, e in job.scalars]
        job.scalars = limits
    check(DESIGN, jobs, seed=right)


@pytest.mark.parametrize("u_shift", [0, 1, 47, 48, 49, 63])
def test_shifts_of_products(u_shift: int) -> None:
    rng = random.Random(u_shift)
    jobs = [
        job_of(rng, DESIGN, epilogue, 8, right=10, u_shift=u_shift)
        for epilogue in (Epilogue.GLU, Epilogue.MLGRU)
    ]
    check(DESIGN, jobs, seed=u_shift)


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_commands_in_any_order(rng: random.Random) -> None:
    jobs = [
        with_residual_in_place(
            rng, job_of(rng, DESIGN, rng.choice(list(Epilogue)), rng.choice([0, 1, 2, 3, 9, 20]))
        )
        for _ in range(rng.randint(2, 6))
    ]
    check(DESIGN, jobs, seed=rng.randrange(1 << 16))


def test_state_goes_from_token_to_token() -> None:
    rng = random.Random(5)
    jobs = []
    for token in range(4):
        job = job_of(rng, DESIGN, Epilogue.MLGRU, 24, right=18)
        job.aux, job.fresh = 8, token == 0
        jobs.append(job)
    check(DESIGN, jobs, stalls=False)


@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda kind: kind.name.lower())
def test_one_sum_a_cycle(epilogue: Epilogue) -> None:
    """A command costs its sums and a pipeline's length, never more a sum."""
    rng = random.Random(1)
    cycles = {}
    for elements in (20, 60):
        job = with_residual_in_place(rng, job_of(rng, DESIGN, epilogue, elements))
        job.dst, job.aux, job.lb = 0, 0, 0
        cycles[elements] = check(DESIGN, [job], stalls=False).cycles
    slots = SLOTS.get(epilogue, 1)
    assert cycles[60] - cycles[20] == 40 * slots
    assert cycles[20] - 20 * slots < 70


def test_first_of_equal_logits_and_all_negative() -> None:
    scalars = [(1 << 23, -5 - 18)]
    for sums in ([[5], [9], [9], [3]], [[-7], [-9], [-7]], [[-(1 << 23)], [-(1 << 23)]]):
        check(DESIGN, [Job(Epilogue.LOGITS, sums, scalars, fraction=0)])


def test_a_host_that_stalls_loses_no_logit() -> None:
    rng = random.Random(2)
    job = job_of(rng, DESIGN, Epilogue.LOGITS, 150)
    check(DESIGN, [job, job], seed=3)


def test_state_memory_of_several_banks() -> None:
    rng = random.Random(4)
    design = Design(lanes=32, element_lanes=4, vector_words=256, state_words=1 << 15)
    jobs = [job_of(rng, design, Epilogue.MLGRU, 10, right=18) for _ in range(3)]
    for job, fresh in zip(jobs, (True, False, False), strict=True):
        job.aux, job.fresh, job.bounded = (1 << 14) - 5, fresh, 0
    others = [job_of(rng, design, Epilogue.MLGRU, 10, right=18) for _ in range(3)]
    for job, fresh in zip(others, (True, False, False), strict=True):
        job.aux, job.fresh, job.bounded = (1 << 13) - 5, fresh, 0
    check(design, [job for pair in zip(jobs, others, strict=True) for job in pair])


def test_saturations_are_counted_by_cause() -> None:
    most = (1 << 23) - 1
    same = [(1 << 23, -23)] * 2  # y = sum: times 2^17, and s = 17
    rng = random.Random(6)
    causes = {
        "rescale": Job(Epilogue.STORE, [[most], [1], [-most - 1]], [(1 << 23, -22)], fraction=0),
        "residual": Job(Epilogue.ADD, [[9], [-9]] * 15, same, fraction=0),
        "product": Job(Epilogue.GLU, [[most, most], [5, 5]], same, fraction=0, u_shift=1),
    }
    for cause, job in causes.items():
        counts = check(DESIGN, [job]).saturations
        assert counts[cause] > 0, (cause, job)
    wide = [job_of(rng, WIDER_STATE, Epilogue.MLGRU, 20, right=12) for _ in range(2)]
    assert check(WIDER_STATE, wide).saturations["state"] > 0


def test_largest_logit_among_runs_that_rise_and_fall() -> None:
    rng = random.Random(8)
    scalars = [(1 << 23, -23)]
    jobs = [
        Job(Epilogue.LOGITS, [[rng.randint(-4, 4)] for _ in range(rng.randint(1, 12))], scalars)
        for _ in range(25)
    ]
    for job in jobs:
        job.fraction = 0
    check(DESIGN, jobs, stalls=False)
    check(DESIGN, jobs, seed=9)
