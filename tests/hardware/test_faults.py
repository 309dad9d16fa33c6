"""The checks of the hardware find every planted fault, and pass without it."""

from __future__ import annotations

import random

import pytest
from hardware.faults import FAULTS, Fault, planted
from hardware.row_bench import check
from hardware.test_row_unit import DESIGN, job_of

from nomatmul.hardware.rtl.ports import Epilogue


def check_mlgru() -> None:
    """A second fresh token on a state that the first one left."""
    rng = random.Random(3)
    jobs = [job_of(rng, DESIGN, Epilogue.MLGRU, 6, right=18) for _ in range(2)]
    for job in jobs:
        job.aux, job.fresh = 8, True
    check(DESIGN, jobs, stalls=False)


def test_there_are_more_than_ten():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 10
    assert len({(fault.module, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault):
    with planted(fault), pytest.raises(AssertionError):
        fault.run()


def test_a_fault_is_gone_afterwards():
    """And with it what its check found: else every check would find something."""
    with planted(FAULTS[0]):
        pass
    FAULTS[0].run()
    check_mlgru()


def test_a_fault_that_changes_nothing_is_none():
    nowhere = Fault("nothing", "walk", "no such text", "", "")
    with pytest.raises(AssertionError, match="its text is there 0 times"), planted(nowhere):
        pass
