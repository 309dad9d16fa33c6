"""How many threads numpy's BLAS uses, set for a while and given back."""

from __future__ import annotations

import contextlib
import functools
from typing import Any


@functools.cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    import numpy  # noqa: F401 - the controller finds libraries that are loaded already

    return ThreadpoolController().select(user_api="blas")


def blas_threads(count: int) -> Any:
    """A context manager: dense products inside take `count` threads.

    Without threadpoolctl the BLAS keeps its own setting (OPENBLAS_NUM_THREADS).
    """
    controller = _controller()
    return contextlib.nullcontext() if controller is None else controller.limit(limits=count)


def blas_name() -> str:
    """Name and version of the BLAS behind numpy, for tables; "unknown" without threadpoolctl."""
    controller = _controller()
    found = controller.info() if controller is not None else []
    return " and ".join(sorted({f"{x['internal_api']} {x['version']}" for x in found})) or "unknown"
