"""Lets transformers' Auto classes find this package's models once `nomatmul` is imported.

Importing nomatmul must load neither torch nor transformers, so nothing is registered at that
moment. A finder on `sys.meta_path` watches for transformers' own modules instead; when the
outermost of their imports is done and the Auto tables exist, `nomatmul.models` is imported, which
registers itself. Waiting for the outermost import keeps half-made modules out of reach.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # importing the real ones costs the command line 20 ms, and the protocols need no base
    Loader = MetaPathFinder = object

_TABLE = "transformers.models.auto.configuration_auto"


class _Loader(Loader):
    """Runs the module by its own loader, then tells the finder that it is done."""

    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self._inner = inner
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._finder.depth += 1
        try:
            # the module shall see its real loader, as inspect and pickle do
            if module.__spec__ is not None:
                module.__spec__.loader = self._inner
            module.__loader__ = self._inner
            self._inner.exec_module(module)
        finally:
            self._finder.depth -= 1
        self._finder.finished()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.depth = 0
        self._searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("transformers") or self._searching:
            return None
        if name.partition(".")[0] != "transformers":
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        finally:
            self._searching = False
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec

    def finished(self) -> None:
        if self.depth == 0 and _TABLE in sys.modules:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()


def _register() -> None:
    if importlib.util.find_spec("torch") is None:
        return
    try:
        importlib.import_module("nomatmul.models")
    except Exception as error:  # a foreign import must not fail because of us
        warnings.warn(
            f"nomatmul could not register its models with transformers: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Register with transformers now if it is loaded, else as soon as it is. Costs nothing."""
    if "nomatmul.models" in sys.modules:
        return
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
