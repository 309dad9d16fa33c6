"""Language models without matrix multiplication: train, pack, run.

    import nomatmul
    lm = nomatmul.load()                   # the model in the box; or the path of a packed model,
                                           # or hf:owner/name of one on the Hugging Face Hub
    print(lm.generate("The river", max_tokens=50))

This module imports neither numpy nor torch; names are imported when first used. The torch side
is in `nomatmul.models` and `nomatmul.train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nomatmul import _hub_names, _transformers

if TYPE_CHECKING:
    from nomatmul.engine.encoder_model import EncoderModel
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.loading import load
    from nomatmul.engine.report import footprint
    from nomatmul.engine.session import Session
    from nomatmul.formats.config import ModelConfig

__version__ = "0.1.0"
__all__ = [
    "EncoderModel",
    "LanguageModel",
    "ModelConfig",
    "Session",
    "__version__",
    "footprint",
    "load",
]

_HOMES = {
    "load": "nomatmul.engine.loading",
    "EncoderModel": "nomatmul.engine.encoder_model",
    "LanguageModel": "nomatmul.engine.language_model",
    "Session": "nomatmul.engine.session",
    "footprint": "nomatmul.engine.report",
    "ModelConfig": "nomatmul.formats.config",
}
_ROOMS = ("cli", "convert", "engine", "evaluate", "formats", "models", "ops", "reference", "train")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"nomatmul.{name}")
    raise AttributeError(f"module 'nomatmul' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])


_hub_names.set_packer(
    lambda name: importlib.import_module("nomatmul.convert.hub").packed_directory(name)
)
# Auto classes of transformers find our models; nothing is imported until transformers is.
_transformers.install()
