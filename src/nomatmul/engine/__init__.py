"""Inference on a CPU, without torch: load, sessions, sampling. See `nomatmul.load`.

Names are imported when first used, so that `import nomatmul` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see in place of `__getattr__`
    from nomatmul.engine.chat import Chat as Chat
    from nomatmul.engine.doctor import self_test as self_test
    from nomatmul.engine.encoder_model import EncoderModel as EncoderModel
    from nomatmul.engine.generation import TextStream as TextStream
    from nomatmul.engine.language_model import LanguageModel as LanguageModel
    from nomatmul.engine.loading import load as load
    from nomatmul.engine.loading import random_model as random_model
    from nomatmul.engine.report import cpu_report as cpu_report
    from nomatmul.engine.report import footprint as footprint
    from nomatmul.engine.report import gpu_report as gpu_report
    from nomatmul.engine.report import read_bandwidth as read_bandwidth
    from nomatmul.engine.sampling import Sampler as Sampler
    from nomatmul.engine.sampling import Sampling as Sampling
    from nomatmul.engine.session import Session as Session

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
