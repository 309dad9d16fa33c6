"""A server of the model in the box for all tests that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.serving import Running, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """A server in a thread of this process; see `running_server` for one of your own."""
    with running_server() as running:
        yield running
