"""Tests of this folder need a GPU: all get the mark `gpu`, and skip where there is none.

benchmarks/gpu_tests.py runs them on a GPU machine and writes a table. The fixture `shared`
(recorded traces, tests/conftest.py) looks at $NOMATMUL_SHARED first, for machines where the folder
does not lie beside the repository.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _missing() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"needs torch: {error}"
    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder (the hook sees all tests), and skip them without a GPU."""
    reason = _missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
