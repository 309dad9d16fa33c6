"""Configs of published decoders of Llama's shape, translated.

A family is a small table (`llama`, `qwen3`, `bitnet`); what they share stands here. A block is
attention with grouped heads and rotary positions, and a gated layer, each behind an RMSNorm. What
the config cannot say, whether and how its weights are ternary, `llama_form` finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.dials import MAX_LAYERS
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.keys import end_tokens, is_one_of, sort_keys
from nomatmul.formats.rotary import RopeScaling

_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
_READ = (
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "is_bitnet_config"),
    *("weight_bits", "input_bits"),
)
# Option -> the values under which the model is the one that we compute.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    # what a decoder has unless its config says no
    **dict.fromkeys(("is_causal", "causal", "use_causal_mask", "use_rope", "use_rotary"), (True,)),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_AS_HEADS = ("num_key_value_heads", "head_dim")
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers")


@dataclass(frozen=True)
class Family:
    """What one model_type has that others have not.

    sub_norms: an RMSNorm in front of o_proj and down_proj. qk_norm: one on each head of q and k.
    windows: does the config speak of sliding windows, in use or not? default_window: their size
    where the config leaves it out, of a family whose layers all have one unless it is null.
    defaults: of absent keys.
    """

    model_type: str
    activation: str = "silu"
    sub_norms: bool = False
    qk_norm: bool = False
    windows: bool = False
    default_window: int | None = None
    defaults: JsonObject = field(default_factory=dict)


def ignored_keys(family: Family, values: JsonObject) -> tuple[str, ...]:
    """Keys that are set, unknown, and ignored; see `sort_keys`."""
    known = {"model_type", "layer_types", *_REQUIRED, *_READ, *_ONLY_VALUES}
    return sort_keys(values, known | set(_WINDOWS if family.windows else ()))


def check_options(family: Family, values: JsonObject) -> None:
    """Raise FormatError naming an option that we do not compute or a size that is absent."""
    for key, legal in _ONLY_VALUES.items():
        if values.get(key) is not None and not is_one_of(values[key], legal):
            raise FormatError(f"{key} {values[key]!r} is not supported; it must be {legal[0]!r}")
    for key in _REQUIRED:
        if values.get(key) is None:
            raise FormatError(f"the {family.model_type} config lacks {key!r}")
        if isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < 1:
            raise FormatError(f"{key} {values[key]!r} must be a whole number above 0")
    if values["num_hidden_layers"] > MAX_LAYERS:  # tensors are named before a config is made
        raise FormatError(
            f"num_hidden_layers {values['num_hidden_layers']} is above the limit {MAX_LAYERS}"
        )
    activation = values.get("hidden_act")
    activation = family.activation if activation is None else activation
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        legal_acts = ", ".join(map(repr, _ACTIVATIONS))
        raise FormatError(f"hidden_act {activation!r} is not supported; legal are {legal_acts}")
    if family.default_window is None:
        _check_windows(values)
    else:
        _check_one_window(family, values)


def _check_one_window(family: Family, values: JsonObject) -> None:
    """Of a family without layers of several kinds; a window that no text fills changes nothing."""
    window = values.get("sliding_window", family.default_window)
    longest = values.get("max_position_embeddings")
    if longest is None:
        longest = family.defaults["max_position_embeddings"]
    if window is not None and not (_is_size(window) and _is_size(longest) and window >= longest):
        raise FormatError(
            f"sliding_window {window!r} is shorter than max_position_embeddings {longest!r};"
            " sliding windows are not supported"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_windows(values: JsonObject) -> None:
    kinds = values.get("layer_types")
    if kinds is not None:
        other = [kind for kind in kinds if kind != "full_attention"] if _is_list(kinds) else [kinds]
        if other:
            raise FormatError(f"layer_types holds {other[0]!r}; only 'full_attention' is supported")
    elif values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None:
        first, layers = values.get("max_window_layers", 28), values["num_hidden_layers"]
        if not isinstance(first, int) or first < layers:
            raise FormatError(
                f"sliding_window {values.get('sliding_window', 4096)} is in use from layer {first}"
                " on; sliding windows are not supported"
            )


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def config_of(
    family: Family, values: JsonObject, linears: Callable[[float], JsonObject]
) -> ModelConfig:
    """The dials that a config.json stands for; linears: those of linears, of the eps of norms.

    Raises FormatError, by name, for values that are illegal.
    """
    given = {**family.defaults, **{k: v for k, v in values.items() if v is not None}}
    for key in _AS_HEADS:
        if key in values and values[key] is None:
            given.pop(key, None)  # null is no default, but what the heads say
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    kv_heads, head_dim = given.get("num_key_value_heads", heads), given.get("head_dim")
    theta, scaling = _rotary(given)
    try:
        return ModelConfig(
            vocab_size=given["vocab_size"],
            hidden_size=hidden,
            num_layers=given["num_hidden_layers"],
            token_mixer="attention",
            channel_mixer="glu",
            positions="rotary",
            intermediate_size=given["intermediate_size"],
            num_heads=heads,
            num_kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if head_dim is None or head_dim * heads == hidden else head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=family.qk_norm,
            glu_activation=_ACTIVATIONS[given.get("hidden_act", family.activation)],
            max_position_embeddings=given["max_position_embeddings"],
            norm_eps=given["rms_norm_eps"],
            tie_embeddings=given.get("tie_word_embeddings", False),
            initializer_range=given.get("initializer_range", 0.02),
            bos_token_id=_first(given.get("bos_token_id")),
            eos_token_id=end_tokens(given.get("eos_token_id")),
            pad_token_id=_first(given.get("pad_token_id")),
            **linears(given["rms_norm_eps"]),
        )
    except FormatError:
        raise
    except (ValueError, TypeError) as error:
        raise FormatError(f"published config: {error}") from None


def _rotary(given: JsonObject) -> tuple[Any, RopeScaling | None]:
    """(theta, scaling) of `rope_parameters`, or of `rope_theta` and `rope_scaling`, as older files
    name them."""
    numbers = _rope_numbers(given)
    if not numbers:
        return given["rope_theta"], None
    theta = numbers.pop("rope_theta", given["rope_theta"])
    if numbers.pop("partial_rotary_factor", 1.0) != 1.0:
        raise FormatError("partial_rotary_factor is not supported; it must be 1.0")
    if numbers["rope_type"] == "default":
        return theta, None
    if numbers["rope_type"] == "yarn":
        length = given["max_position_embeddings"]
        numbers.setdefault("original_max_position_embeddings", length)
    try:
        return theta, RopeScaling.from_dict(numbers)
    except (ValueError, TypeError) as error:
        raise FormatError(f"published config: {error}") from None


def _rope_numbers(given: JsonObject) -> JsonObject:
    """`rope_parameters` or `rope_scaling`; files that have both say the same twice, or which one
    is meant cannot be told."""
    found: list[JsonObject] = []
    for key in ("rope_parameters", "rope_scaling"):
        numbers = given.get(key, {})
        if not isinstance(numbers, dict):
            raise FormatError(f"{key} must be an object, got {numbers!r}")
        nested = next((name for name, value in numbers.items() if isinstance(value, dict)), None)
        if nested is not None:
            raise FormatError(f"{key} has numbers for {nested!r} alone, which is not supported")
        if numbers:
            kind = numbers.get("rope_type", numbers.get("type", "default"))
            if numbers.get("factor") is not None and not {"rope_type", "type"} & numbers.keys():
                raise FormatError(f"{key} {numbers!r} has a factor, but no rope_type")
            rest = {
                name: value for name, value in numbers.items() if (name, value) != ("type", kind)
            }
            found.append({"rope_theta": given["rope_theta"], **rest, "rope_type": kind})
    if len(found) == 2 and found[0] != found[1]:
        raise FormatError(
            f"rope_parameters {given['rope_parameters']!r} and rope_scaling"
            f" {given['rope_scaling']!r} are not the same"
        )
    return found[0] if found else {}


def _first(value: Any) -> Any:
    """A list of ids stands for its first, -1 for none."""
    if isinstance(value, list) and value:
        value = value[0]
    return None if value == -1 else value
