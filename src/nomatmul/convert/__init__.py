"""Turning models of other forms into packed ones, and into what other engines read (`export`).

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomatmul.convert.check import PackCheck
    from nomatmul.convert.packing import PackResult, pack

__all__ = ["PackCheck", "PackResult", "pack"]

_HOMES = {"PackCheck": "check", "PackResult": "packing", "pack": "packing"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
