"""Typed look-ups in the metadata of a GGUF file, and what becomes of keys that nothing asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nomatmul.formats.errors import FormatError
from nomatmul.formats.published.keys import is_one_of, sort_keys, warn_ignored

_MOST = 1 << 31
# Of these only the values under which the model is the one that we compute.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),  # llama.cpp's own order of q and k
    "pooling_type": (0, 3),  # none, the last token
    "use_parallel_residual": (False,),
}
# What a file says of itself and of its making; of `tokenizer.` the tokenizer's reader judges.
_HARMLESS = ("general.", "tokenizer.", "quantize.", "split.", "mradermacher.")
_ROTATION = "prism.hadamard."


class Keys:
    """The metadata of a file, whose name for errors is `path`.

    Each look-up raises FormatError, naming the key and the limit.
    """

    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self.path, self.metadata = path, metadata
        self._asked: set[str] = set()

    def array(self, key: str) -> Any:
        """A list of strings or an array of numbers, or None."""
        self._asked.add(key)
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, (list, np.ndarray)):
            raise FormatError(f"{self.path}: {key} is {_shown(value)}; it must be an array")
        return value

    def get(self, key: str) -> bool | int | float | str | None:
        """A single value, or None."""
        self._asked.add(key)
        value = self.metadata.get(key)
        if isinstance(value, (list, np.ndarray)):
            raise FormatError(f"{self.path}: {key} is {_shown(value)}; it must be one value")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._typed(key, str, lambda value: True, "a string", default))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, bool, lambda value: True, "true or false", default))

    def count(self, key: str, default: int | None = None) -> int:
        words = f"a whole number from 1 to {_MOST}"
        return int(self._typed(key, int, lambda value: 0 < value <= _MOST, words, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 above 0, as the shortest decimal number that it is nearest to."""
        words = "a number above 0, and no huge one"
        value = self._typed(key, float, lambda value: 1e-30 < value < 1e30, words, default)
        return float(str(np.float32(value)))

    def unasked(self, prefix: str) -> list[str]:
        """Keys that begin so and that nobody asked for."""
        return [key for key in self.metadata if key.startswith(prefix) and key not in self._asked]

    def refuse_others(self, architecture: str) -> None:
        """Refuse what nobody asked for where it may change what the model computes; warn of others.

        Call it last.
        """
        unknown: dict[str, Any] = {}
        for key, value in self.metadata.items():
            short = key.removeprefix(f"{architecture}.")
            if key in self._asked or key.startswith(_HARMLESS):
                continue
            if key.startswith(_ROTATION):
                raise FormatError(
                    f"{self.path}: {key!r}: weights behind a Hadamard rotation are not supported"
                )
            if short != key and short in _ONLY_VALUES:
                self._check_value(key, value, _ONLY_VALUES[short])
            elif short != key:
                raise FormatError(
                    f"{self.path}: unknown metadata key {key!r}: it may change what the model"
                    " computes"
                )
            else:
                unknown[key] = value
        shown = {key: True for key, value in unknown.items() if _is_set(value)}
        warn_ignored(sort_keys(shown, ()))

    def _check_value(self, key: str, value: Any, legal: tuple[object, ...]) -> None:
        if not is_one_of(value, legal):
            choices = " or ".join(map(repr, legal))
            raise FormatError(f"{self.path}: {key} is {_shown(value)}; it must be {choices}")

    def _typed(
        self, key: str, kind: type, legal: Callable[[Any], bool], words: str, default: Any
    ) -> Any:
        value = self.get(key)
        if value is None:
            if default is None:
                raise FormatError(f"{self.path} lacks the metadata key {key!r}")
            return default
        if type(value) is not kind or not legal(value):
            raise FormatError(f"{self.path}: {key} is {_shown(value)}; it must be {words}")
        return value


def _shown(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."


def _is_set(value: Any) -> bool:
    return isinstance(value, np.ndarray) or value is not False
