"""Fields of a config replaced by name: `--set name=value`, `--set model.name=value`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.rotary import RopeScaling
from nomatmul.train.config import TrainConfig


def apply_overrides(config: TrainConfig, assignments: Iterable[str]) -> TrainConfig:
    """Replace fields by "name=value" texts, in order; all checks run on the result only.

    "lr" is accepted for learning_rate. Raises ValueError naming the assignment that is wrong.
    """
    own: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"override {assignment!r} is not of the form name=value")
        name = {"lr": "learning_rate"}.get(name, name)
        if name.startswith("model."):
            name = name.removeprefix("model.")
            model[name] = _parse_value(ModelConfig, name, text.strip(), assignment)
        else:
            own[name] = _parse_value(TrainConfig, name, text.strip(), assignment)
    if model:
        # A changed width must not keep the old width's derived size.
        if "hidden_size" in model and "intermediate_size" not in model:
            model["intermediate_size"] = None
        own["model"] = ModelConfig.from_dict({**config.model.to_dict(), **model})
    return dataclasses.replace(config, **own)


def _parse_value(owner: type, field: str, text: str, assignment: str) -> Any:
    hints = typing.get_type_hints(owner)
    if field not in hints or field in ("model", "recipe"):
        names = sorted(set(hints) - {"model", "recipe"})
        raise ValueError(f"unknown option in {assignment!r}; the options are {', '.join(names)}")
    kinds = typing.get_args(hints[field]) or (hints[field],)
    if text.lower() in ("none", "null") and type(None) in kinds:
        return None
    if RopeScaling in kinds:
        return _to_scaling(text, assignment)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        try:
            return tuple(_to_int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(
                f"override {assignment!r}: {text!r} is no list of whole numbers (1,2,3)"
            ) from None
    for kind, convert in ((bool, _to_bool), (int, _to_int), (float, float), (str, str)):
        if kind in kinds:
            try:
                return convert(text)
            except ValueError:
                raise ValueError(
                    f"override {assignment!r}: {text!r} is not a {kind.__name__}"
                ) from None
    raise AssertionError(f"field {field} has a type that overrides cannot read")


def _to_scaling(text: str, assignment: str) -> RopeScaling | None:
    try:
        return RopeScaling.from_dict(json.loads(text))
    except json.JSONDecodeError:
        raise ValueError(
            f'override {assignment!r}: {text!r} is no JSON object {{"rope_type": ..., ...}}'
        ) from None


def _to_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "on": True,
              "false": False, "0": False, "no": False, "off": False}  # fmt: skip
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _to_int(text: str) -> int:
    value = float(text.replace("_", ""))  # 1e6 is how people write a million tokens
    if not value.is_integer():  # nor is infinity
        raise ValueError(text)
    return int(value)
