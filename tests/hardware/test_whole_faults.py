"""Whole models find planted faults, too: a simulation of the changed hardware differs from the
oracle. Each fault is a build of minutes, so these run with `make hardware`.
"""

from __future__ import annotations

import numpy as np
import pytest
from hardware.faults import FAULTS, planted

from nomatmul.hardware.simulate import Simulation, build
from nomatmul.hardware.simulate.harness import ALL_LOGITS

pytestmark = pytest.mark.slow

WHOLE = [
    "trees that go left where the sum is positive",
    "a wrong interpolation between entries of the table",
    "a stale state behind a fresh token",
]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_differs(name, reader_of, design, tmp_path, monkeypatch):
    """Two beginnings of two tokens each; the cache is the fault's own."""
    monkeypatch.setenv("NOMATMUL_CACHE", str(tmp_path))
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    with planted(fault):
        build.simulator(design)
    reader = reader_of("trees-3x3")
    ids = np.random.default_rng(1).integers(0, reader.config.vocab_size, 2).tolist()
    with Simulation(reader, design, check=True) as simulation:
        for _ in range(2):
            for token in ids:
                simulation.token(token, ALL_LOGITS)
            simulation.restart()
    assert simulation.report().difference is not None
