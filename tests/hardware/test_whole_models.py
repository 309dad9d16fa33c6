"""Whole models at length: the model in the box on the default design, and all small ones with all
kinds of memories and pauses. These run with `make hardware`.
"""

from __future__ import annotations

import numpy as np
import pytest
from hardware.models import RANDOM

from nomatmul.engine.loading import BOX
from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.design import Design
from nomatmul.hardware.simulate import Memory, Simulation
from nomatmul.hardware.simulate.harness import ALL_LOGITS, LARGEST_LOGIT, NO_LOGITS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("simulated")]

WANTS = (LARGEST_LOGIT, ALL_LOGITS, NO_LOGITS)
MEMORIES = {
    "pauses": Memory(stalls=11),
    "pauses, no latency": Memory(stalls=12, latency=0),
    "slow, with pauses": Memory(stalls=13, bytes_a_cycle=1.5, gap=5),
    "one burst at a time": Memory(outstanding=1, latency=90),
    "refreshes": Memory(stalls=14, refresh_every=100, refresh_cycles=20),
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", RANDOM)
def test_small_models_with_every_memory(reader_of, design, name, memory):
    reader = reader_of(name)
    ids = np.random.default_rng(7).integers(0, reader.config.vocab_size, 12).tolist()
    with Simulation(reader, design, MEMORIES[memory], check=True) as simulation:
        for number, token in enumerate(ids):
            simulation.token(token, WANTS[number % 3])
    report = simulation.report()
    assert report.difference is None
    assert report.to_dict()["faults"] == []


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
def test_the_model_in_the_box_for_64_tokens(packing):
    """Every value of 64 tokens; 256 lanes."""
    reader = PackedReader(BOX)
    design = Design(packing=packing, probe=True)
    ids = np.random.default_rng(5).integers(0, reader.config.vocab_size, 64).tolist()
    with Simulation(reader, design, Memory(stalls=21), check=True) as simulation:
        for number, token in enumerate(ids):
            simulation.token(token, WANTS[number % 3])
    report = simulation.report()
    assert report.difference is None
    assert report.instructions >= 64 * 80
