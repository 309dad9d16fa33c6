"""Rotary positions: the frequency of each pair of a head's elements, and their scaling.

The one implementation: the oracle, torch and the engines take their numbers from `frequencies`.
Scalings are those of transformers (`rope_scaling`, `rope_parameters`), in its words.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.checks import check_dial, check_int, check_positive

MAX_ORIGINAL_POSITIONS = 1 << 31

# Of each kind: the numbers that it needs, and those that it may have.
_NEEDED = {
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")}
KINDS = tuple(_NEEDED)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for longer sequences: "linear", "llama3" or "yarn".

    Numbers that do not belong to the kind are None. Raises ValueError, by name, for another kind,
    and for a number that is missing, foreign or out of range.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        check_dial("rope_scaling", self.kind, KINDS)
        needed, optional = _NEEDED[self.kind], _OPTIONAL.get(self.kind, ())
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "kind" or (value is None and name not in needed):
                continue
            if value is None:
                raise ValueError(f"rope_scaling {self.kind!r} needs {name}")
            if name not in (*needed, *optional):
                raise ValueError(f"{name} does not belong to rope_scaling {self.kind!r}")
            if name == "original_max_position_embeddings":
                check_int(f"rope_scaling {name}", value, 1, MAX_ORIGINAL_POSITIONS)
            elif name in ("mscale", "mscale_all_dim") and value == 0:
                object.__setattr__(self, name, 0.0)  # transformers' way to say that it is not used
            else:
                check_positive(f"rope_scaling {name}", value)
                object.__setattr__(self, name, float(value))
        self._check_order("low_freq_factor", "high_freq_factor")
        self._check_order("beta_slow", "beta_fast")

    def _check_order(self, low: str, high: str) -> None:
        least, most = getattr(self, low), getattr(self, high)
        if least is not None and most is not None and least >= most:
            raise ValueError(f"rope_scaling {low} {least} must be below {high} {most}")

    def to_dict(self) -> dict[str, str | float]:
        """The scaling in transformers' words."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return {"rope_type": values.pop("kind"), **values}

    @classmethod
    def from_dict(cls, values: object) -> RopeScaling | None:
        """A scaling in transformers' words ("type" is the older name of "rope_type"); None for the
        type "default".

        Raises ValueError for a key that is unknown, and as the class does.
        """
        if not isinstance(values, dict):
            raise ValueError(f"rope_scaling must be an object with a rope_type, got {values!r}")
        numbers = dict(values)
        kinds = [numbers.pop(key) for key in ("rope_type", "type") if key in numbers]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"rope_scaling needs one rope_type, got {values!r}")
        if kinds[0] == "default" and not numbers:
            return None
        check_dial("rope_scaling", kinds[0], KINDS)
        if kinds[0] == "yarn" and numbers.get("truncate") is True:
            del numbers["truncate"]  # borders of whole pairs, which is what we compute
        known = {field.name for field in dataclasses.fields(cls)} - {"kind"}
        unknown = sorted(str(key) for key in numbers if key not in known)
        if unknown:
            raise ValueError(f"rope_scaling {kinds[0]!r} has the unknown key {unknown[0]!r}")
        if "factor" not in numbers:
            raise ValueError(f"rope_scaling {kinds[0]!r} needs factor")
        return cls(kinds[0], **numbers)


def frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[NDArray[np.float64], float]:
    """Return (radians a position float64 [head_size / 2], factor of cosines and sines).

    The pair (e, e + head_size / 2) turns by position * theta^(-2e / head_size), scaled.
    """
    half = head_size // 2
    inverse = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    return _yarn(inverse, head_size, theta, scaling), _yarn_factor(scaling)


def tables(
    positions: NDArray[np.int64], inverse: NDArray[np.float64], factor: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (cos, sin), float32 [..., half], of positions [...]: angles are float64, the cosine is
    rounded to float32 and then multiplied by the factor."""
    angle = positions[..., None].astype(np.float64) * inverse
    scale = np.float32(factor)
    return np.cos(angle).astype(np.float32) * scale, np.sin(angle).astype(np.float32) * scale


def _llama3(inverse: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Long waves are divided by the factor, short ones kept, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    turns = original * inverse / (2 * math.pi)  # of the wave, in the original length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def _yarn(
    inverse: NDArray[np.float64], head_size: int, theta: float, scaling: RopeScaling
) -> NDArray[np.float64]:
    """Source: arXiv 2309.00071, as transformers computes it."""
    original = scaling.original_max_position_embeddings
    assert original is not None

    def pair(turns: float) -> float:
        """The pair of elements that turns so often in the original length."""
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast or 32.0)), 0)
    high: float = min(math.ceil(pair(scaling.beta_slow or 1.0)), head_size - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(inverse)) - low) / (high - low), 0.0, 1.0)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)
