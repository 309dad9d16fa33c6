"""The one frozen description of a model, with its size and its file.

Published formats are translated into a `ModelConfig` at the border (`published/`); no other
room knows of any other configuration.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nomatmul.formats.architecture import CHANNEL_MIXERS, TOKEN_MIXERS, architecture_of
from nomatmul.formats.checks import check_dial
from nomatmul.formats.dials import Dials
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject, read_json_object

# Fields that came after packed format 1. `to_dict` leaves them out at their default, so what an
# older nomatmul can compute it can also read.
_LATER_FIELDS = (
    "norm",
    "positions",
    "embedding_norm",
    "activation",
    "glu_activation",
    "fff_bias",
    "fff_master_width",
    "fff_layers",
    "num_kv_heads",
    "head_dim",
    "rope_scaling",
    "qk_norm",
    "linear_norm",
    "rounding",
    "split_gate",
    "scale_group",
    "head_linear",
    "embedding_linear",
)

# Dials that nomatmul no longer has, and their values in configs that did not use them. The layers
# are in studies/fff.
RETIRED_DIALS: JsonObject = {"fff_gated": False, "fff_leaf_width": None}


@dataclass(frozen=True)
class ModelConfig(Dials):
    """A model's dials, sizes and epsilons; see `Dials`, which checks them."""

    def __post_init__(self) -> None:
        check_dial("token_mixer", self.token_mixer, tuple(TOKEN_MIXERS))
        check_dial("channel_mixer", self.channel_mixer, tuple(CHANNEL_MIXERS))
        super().__post_init__()

    def param_count(self) -> int:
        """Return the number of stored parameters (a tied head is counted once)."""
        return architecture_of(self).parameters()

    def to_dict(self) -> JsonObject:
        """Return a plain dict that `from_dict` turns back into an equal config."""
        values = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_dict()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _LATER_FIELDS:
            if values[name] == defaults[name]:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: JsonObject) -> ModelConfig:
        """Build a config from a plain dict.

        Raises ValueError for an unknown key, a missing size or an illegal value, by name.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a model config must be a JSON object, got {type(values).__name__}")
        values = drop_retired(values, RETIRED_DIALS)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown config key {', '.join(map(repr, unknown))}")
        for name in ("vocab_size", "hidden_size", "num_layers"):
            if name not in values:
                raise ValueError(f"the config lacks {name!r}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the config as JSON to the file `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read what `save` wrote.

        Raises ValueError when the file is missing, is no JSON or holds no legal config.
        """
        try:
            return cls.from_dict(read_json_object(path))
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None


def drop_retired(values: JsonObject, retired: JsonObject) -> JsonObject:
    """`values` without options that are gone. Raises ValueError, by name, for one that is set."""
    for name, off in retired.items():
        if values.get(name, off) != off:
            raise ValueError(
                f"{name} {values[name]!r} is no longer part of nomatmul (see studies/fff)"
            )
    return {name: value for name, value in values.items() if name not in retired}
