"""A server of the model in the box for all tests that change nothing in it; caches with files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cache_models import BIG, Open
from support.serving import Running, running_server

from nomatmul.engine import LanguageModel
from nomatmul.serve.cache import StateCache


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """A server in a thread of this process; see `running_server` for one of your own."""
    with running_server() as running:
        yield running


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """opened(lm, max_bytes, directory): a cache in a directory, closed with the test."""
    caches = []

    def make(
        lm: LanguageModel, max_bytes: int = BIG, directory: Path = tmp_path / "states"
    ) -> StateCache:
        caches.append(StateCache({"m": lm}, max_bytes, directory))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "state-files"]
