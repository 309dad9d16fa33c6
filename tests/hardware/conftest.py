"""What the accelerator's tests share: models, one small design, and the simulation of it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hardware.models import trained_model, write_random_model

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.design import Design
from nomatmul.hardware.simulate import build

# Room for every model of hardware/models.py, with the unit of trees, so one build is enough. A word
# of memory is half a beat, and half of what the loader takes at once.
SMALL = {"lanes": 32, "element_lanes": 4, "memory_bits": 32, "fifo_words": 64}
SMALL |= {"vector_words": 1024, "parameter_words": 1024, "state_words": 1024}
SMALL |= {"program_words": 256, "activation_beats": 16, "tree_rows": 32}


# Yosys compiles itself once (WebAssembly), a simulation is built once, and a busy machine takes its
# time: the first tests that need them would run into the suite's own limit.
LIMIT = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder their limit of seconds."""
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def design() -> Design:
    """The small design with trees and probes."""
    return Design(**SMALL, trees=True, probe=True)


@pytest.fixture(scope="session")
def simulations(tmp_path_factory, design) -> Path:
    """The cache of simulations, which holds that of `design`: NOMATMUL_CACHE, or the session's own,
    which parallel workers share. The first of them builds, the others wait."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    cache = Path(os.environ.get("NOMATMUL_CACHE") or base / "hardware-cache")
    cache.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(cache / "building", "w") as lock:
        patch.setenv("NOMATMUL_CACHE", str(cache))
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.simulator(design)
    return cache


@pytest.fixture
def simulated(simulations, monkeypatch) -> None:
    """Simulations of `design` start at once."""
    monkeypatch.setenv("NOMATMUL_CACHE", str(simulations))


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Where random models are written, once each."""
    return tmp_path_factory.mktemp("hardware-models")


@pytest.fixture(scope="session")
def reader_of(models):
    """The reader of a model of hardware/models.py by its name, a trained one's as trained-NAME."""

    def read(name: str) -> PackedReader:
        if name.startswith("trained-"):
            return PackedReader(trained_model(name.removeprefix("trained-")))
        return PackedReader(write_random_model(name, models))

    return read
