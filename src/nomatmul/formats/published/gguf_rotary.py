"""Rotary scaling of a GGUF file, as Hugging Face's `rope_scaling`.

llama.cpp's converter writes "linear" and "yarn" as metadata, and turns "llama3" into a table of
divisors, rope_freqs.weight [head size / 2]. Its numbers are found again, and checked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.gguf_keys import Keys
from nomatmul.formats.rotary import RopeScaling, frequencies

_KINDS = ("none", "linear", "yarn")
# What Llama 3.1 and later have beside their factor: low, high and the original length.
LLAMA3 = (1.0, 4.0, 8192)
# Keys of yarn with the only values that are transformers' formula, too.
_YARN_ONLY = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def rope_scaling(
    keys: Keys, architecture: str, values: JsonObject, divisors: NDArray[np.float32] | None
) -> JsonObject | None:
    """Return the `rope_scaling` of a config.json, or None.

    values: the config's sizes; divisors: the file's table, if it has one. Raises FormatError naming
    a kind or number that is not understood.
    """
    prefix = f"{architecture}.rope.scaling."
    kind = keys.get(f"{prefix}type")
    factor = keys.number(f"{prefix}factor", keys.number(f"{architecture}.rope.scale_linear", 1.0))
    for unused in ("finetuned", "original_context_length"):  # but for yarn
        keys.get(prefix + unused)
    if kind is None:
        kind = "linear" if factor != 1.0 else "none"
    if kind not in _KINDS:
        choices = " or ".join(map(repr, _KINDS))
        raise FormatError(f"{keys.path}: {prefix}type is {kind!r}; it must be {choices}")
    if divisors is not None:
        if kind != "none" and factor != 1.0:
            raise FormatError(f"{keys.path} has rope_freqs.weight and {prefix}type {kind!r}")
        return _llama3(divisors, values, keys.path)
    if kind == "yarn":
        return _yarn(keys, prefix, factor, values)
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "factor": factor}


def _yarn(keys: Keys, prefix: str, factor: float, values: JsonObject) -> JsonObject:
    for name, only in _YARN_ONLY.items():
        found = keys.get(prefix + name)
        if found is not None and found != only:
            raise FormatError(f"{keys.path}: {prefix}{name} is {found!r}; it must be {only}")
    original = f"{prefix}original_context_length"
    scaling: JsonObject = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count(original, values["max_position_embeddings"]),
    }
    for name, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.get(prefix + name) is not None:
            scaling[ours] = keys.number(prefix + name)
    attention = f"{prefix}attn_factor"
    if keys.get(attention) is not None:  # llama.cpp multiplies its own factor by it
        own = 1.0 + 0.1 * float(np.log(factor)) if factor > 1 else 1.0
        scaling["attention_factor"] = keys.number(attention) * own
    return scaling


def _llama3(divisors: NDArray[np.float32], values: JsonObject, path: object) -> JsonObject | None:
    """The numbers of "llama3" that give these divisors of the frequencies."""
    head, theta = values["head_dim"], values["rope_theta"]
    factor = round(float(divisors.max()), 4)
    if not factor >= 1 or not (divisors > 0).all():
        raise FormatError(f"{path}: rope_freqs.weight has divisors up to {factor}; none is below 1")
    if (divisors == 1).all():
        return None
    scaling = RopeScaling("llama3", factor, *LLAMA3)
    wanted = frequencies(head, theta)[0] / frequencies(head, theta, scaling)[0]
    if not np.allclose(divisors, wanted, rtol=1e-4, atol=0):
        raise FormatError(
            f"{path}: rope_freqs.weight is not the table of rotary scaling 'llama3' with the factor"
            f" {factor} and Llama's own low, high and original lengths"
        )
    return dict(scaling.to_dict())
