"""Training on the user's own text: `run(config, data, out)` from Python, `main(args)` from a shell.

Importing this package is cheap: torch is imported when a run starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nomatmul._extras import require_train

if TYPE_CHECKING:
    from nomatmul.train.args import TrainArgs
    from nomatmul.train.config import TrainConfig
    from nomatmul.train.job import run
    from nomatmul.train.main import main
    from nomatmul.train.overrides import apply_overrides
    from nomatmul.train.recipes import RECIPES, recipe
    from nomatmul.train.result import RunResult

__all__ = [
    "RECIPES",
    "RunResult",
    "TrainArgs",
    "TrainConfig",
    "apply_overrides",
    "main",
    "recipe",
    "run",
]

_HOMES = {
    "RECIPES": "recipes",
    "recipe": "recipes",
    "RunResult": "result",
    "run": "job",
    "TrainArgs": "args",
    "TrainConfig": "config",
    "apply_overrides": "overrides",
    "main": "main",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("run", "RunResult"):
        require_train("training")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # else the submodule `main` would hide the function `main`
    return value
