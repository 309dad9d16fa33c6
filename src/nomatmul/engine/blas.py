"""How many threads numpy's BLAS uses, set for a while and given back."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any


@functools.cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    import numpy  # noqa: F401 - the controller finds libraries that are loaded already

    return ThreadpoolController().select(user_api="blas")


# The setting belongs to the process: two models that compute at a time would each give back the
# other's, and a sum of dense products depends on the number of threads.
_LOCK = threading.RLock()


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Dense products inside take `count` threads; one caller at a time, others wait.

    Without threadpoolctl the BLAS keeps its own setting (OPENBLAS_NUM_THREADS).
    """
    controller = _controller()
    if controller is None:
        yield
        return
    with _LOCK, controller.limit(limits=count):
        yield


def blas_name() -> str:
    """Name and version of the BLAS behind numpy, for tables; "unknown" without threadpoolctl."""
    controller = _controller()
    found = controller.info() if controller is not None else []
    return " and ".join(sorted({f"{x['internal_api']} {x['version']}" for x in found})) or "unknown"
