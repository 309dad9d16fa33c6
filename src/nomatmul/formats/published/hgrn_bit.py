"""The published `hgrn_bit` checkpoints (arXiv 2406.02528): config and names, both ways stated once.

Facts follow the authors' code: block norms, the final norm and g_norm use `rms_norm_eps` (the
block hands it to the mixer, which hands it to g_norm, so the 1e-5 in g_norm's own signature is
never used); the fused BitLinear uses its function's default 1e-6 whatever the config says.
"""

from __future__ import annotations

from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.dials import default_intermediate_size
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.keys import end_tokens, is_one_of, sort_keys, warn_ignored

MODEL_TYPE = "hgrn_bit"

# Read by the authors' code only where `use_short_conv` is true, which is refused.
_IDLE_KEYS = frozenset({"conv_size", "share_conv_kernel", "conv_bias"})
# Published option -> the values under which the model is the one that we compute.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "attn_mode": ("fused_recurrent",),
    "expand_ratio": (1,),
    "use_short_conv": (False,),
    "hidden_act": ("swish", "silu"),
    "rotary_embeddings": (False,),
}
_DEFAULTS: JsonObject = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 1,
    "use_lower_bound": True,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}

# Of these null is a value: none, or "as the other sizes say".
_NULLS = ("intermediate_size", "pad_token_id", "bos_token_id", "eos_token_id")


def config_from_published(values: JsonObject) -> ModelConfig:
    """Translate the dict of a published config.json into a ModelConfig.

    Keys that are absent or null take the authors' defaults. Raises FormatError naming the key for
    an option that we do not compute or an illegal value; warns of keys that are unknown.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise FormatError(
            f"model_type {values.get('model_type')!r} is not the published {MODEL_TYPE!r}"
        )
    warn_ignored(ignored_keys(values))
    for key, legal in _ONLY_VALUES.items():
        if values.get(key) is not None and not is_one_of(values[key], legal):
            choices = " or ".join(map(repr, legal))
            raise FormatError(f"{key} {values[key]!r} is not supported; it must be {choices}")
    given = {k: v for k, v in values.items() if k in _DEFAULTS and (v is not None or k in _NULLS)}
    return _translate({**_DEFAULTS, **given})


def ignored_keys(values: JsonObject) -> tuple[str, ...]:
    """Keys of a published config.json that are set, unknown, and ignored; see `sort_keys`."""
    return sort_keys(values, {"model_type", *_DEFAULTS, *_ONLY_VALUES, *_IDLE_KEYS})


def _translate(options: JsonObject) -> ModelConfig:
    hidden = options["hidden_size"]
    ratio = 4 if options["hidden_ratio"] is None else options["hidden_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1e6:
        raise FormatError(f"hidden_ratio {ratio!r} must be a number above 0")
    inner = options["intermediate_size"]
    if inner is None and isinstance(hidden, int):
        inner = default_intermediate_size(hidden, ratio)
    try:
        return ModelConfig(
            vocab_size=options["vocab_size"],
            hidden_size=hidden,
            num_layers=options["num_hidden_layers"],
            intermediate_size=inner,
            num_heads=options["num_heads"],
            max_position_embeddings=options["max_position_embeddings"],
            norm_eps=options["rms_norm_eps"],
            linear_norm_eps=1e-6,
            gate_norm_eps=options["rms_norm_eps"],
            use_lower_bound=options["use_lower_bound"],
            tie_embeddings=options["tie_word_embeddings"],
            initializer_range=options["initializer_range"],
            bos_token_id=_token_id(options["bos_token_id"]),
            eos_token_id=end_tokens(options["eos_token_id"]),
            pad_token_id=_token_id(options["pad_token_id"]),
        )
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"published config: {error}") from None


def _token_id(value: Any) -> Any:
    """A list of ids stands for its first, -1 for none."""
    if isinstance(value, list) and value:
        value = value[0]
    return None if value == -1 else value


_OUTER = {
    "embedding.weight": "model.embeddings.weight",
    "lower_bounds": "model.lower_bounds",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "head.norm.weight": "lm_head.norm.weight",
}
_INNER = {"mixer": "attn", "mixer_norm": "attn_norm", "channel": "mlp", "channel_norm": "mlp_norm"}


def published_name(name: str) -> str:
    """Return the published name of our tensor `name`.

    "layers.3.mixer.i_proj.weight" -> "model.layers.3.attn.i_proj.weight".
    """
    if name in _OUTER:
        return _OUTER[name]
    head, layer, part, rest = name.split(".", 3)
    assert head == "layers", f"no published name for {name!r}"
    return f"model.layers.{layer}.{_INNER[part]}.{rest}"
