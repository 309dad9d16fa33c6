"""Inference on a CPU, without torch: load, sessions, sampling. See `nomatmul.load`.

Names are imported when first used, so that `import nomatmul` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Chat": "chat",
    "load": "loading",
    "EncoderModel": "encoder_model",
    "LanguageModel": "language_model",
    "Session": "session",
    "TextStream": "generation",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "random_model": "loading",
    "cpu_report": "report",
    "footprint": "report",
    "gpu_report": "report",
    "read_bandwidth": "report",
    "self_test": "doctor",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
