"""`ModelConfig` in the clothes that transformers wants."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from nomatmul.formats.config import RETIRED_DIALS, ModelConfig
from nomatmul.formats.encoder import (
    ENCODER_DEFAULTS,
    ENCODER_MODEL_TYPE,
    HEAD_FIELDS,
    EncoderHead,
    reading_of,
)
from nomatmul.models.hf.cache import CACHE_NAMES

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "tie_word_embeddings": "tie_embeddings",
}
_EXTRA_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "use_cache",
}
"""Keys of transformers that its default configuration does not list."""


def _fields_of(config: ModelConfig) -> dict[str, Any]:
    """All fields as values of JSON, also those at their default."""
    return {name: getattr(config, name) for name in _FIELDS} | config.to_dict()


class CausalLMConfig(PretrainedConfig):
    """The dials and sizes of `ModelConfig`, plus what transformers keeps in a config.json.

    Takes every field of `ModelConfig` by name (vocab_size, hidden_size and num_layers default to
    the published 370M) and transformers' own settings. Raises ValueError for an unknown key or
    an illegal value, naming it. `model_config` gives the frozen `ModelConfig`. stored_linears: the
    model's ternary weights are values and scales as they were published, not latent floats.
    """

    model_type = "nomatmul"
    attribute_map = _ALIASES
    stored_linears = False  # in the file only where it is true, as older versions know none
    rope_scaling = None  # a field of ours: transformers' own is another name of rope_parameters
    keys_to_ignore_at_inference = [*CACHE_NAMES, "hidden_states"]  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_layers: int = 24,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        values = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for alias, name in _ALIASES.items():
            if alias in kwargs:
                values[name] = kwargs.pop(alias)
        if kwargs.pop("stored_linears", False):
            self.stored_linears = True
        dials = (*_FIELDS, *RETIRED_DIALS)
        values |= {name: kwargs.pop(name) for name in dials if name in kwargs}
        known = _EXTRA_KEYS | set(PretrainedConfig().to_dict())
        unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"unknown config key {', '.join(map(repr, unknown))}")
        fields = _fields_of(ModelConfig.from_dict(values))
        for name, value in fields.items():
            setattr(self, name, value)
        self.use_cache = use_cache
        super().__init__(**kwargs)
        for name, value in fields.items():  # the base class may set its own defaults over ours
            setattr(self, name, value)

    @property
    def model_config(self) -> ModelConfig:
        """The frozen description; ValueError if an attribute was set to something illegal."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> CausalLMConfig:
        """Wrap a `ModelConfig`; kwargs are transformers' own settings."""
        return cls(**_fields_of(config), **kwargs)


class PublishedConfig(CausalLMConfig):
    """Registered for the published `hgrn_bit` model type; reading one gives a CausalLMConfig."""

    model_type = "hgrn_bit"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Translate a published config.json. Raises ValueError for options not supported."""
        from nomatmul.formats.published import config_from_published

        translated = config_from_published(config_dict).to_dict()
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        if dtype is not None:
            translated["dtype"] = dtype
        return CausalLMConfig.from_dict(translated, **kwargs)


class EncoderConfig(CausalLMConfig):
    """The same for encoders, and what their classification heads need (`EncoderHead`).

    What is not given is crammed BERT's (arXiv 2212.14034): attention without direction, a dense
    `ffn`, LayerNorm, scaled sinusoidal positions, a tied head.
    """

    model_type = ENCODER_MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        given = {_ALIASES.get(name, name) for name in kwargs}
        values = {name: v for name, v in ENCODER_DEFAULTS.items() if name not in given} | kwargs
        head = EncoderHead.of(values)
        values = {name: v for name, v in values.items() if name not in HEAD_FIELDS}
        values.setdefault("use_cache", False)
        super().__init__(**values)
        for name in HEAD_FIELDS:
            setattr(self, name, getattr(head, name))

    @property
    def head(self) -> EncoderHead:
        """The description of the heads; ValueError if an attribute was set to something illegal."""
        return EncoderHead.of({name: getattr(self, name) for name in HEAD_FIELDS})


class PublishedEncoderConfig(EncoderConfig):
    """Registered for the published `crammedBERT` model type; reading one gives an EncoderConfig."""

    model_type = "crammedBERT"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Translate a published config.json. Raises ValueError for options not supported."""
        from nomatmul.formats.published.crammed_bert import encoder_from_published

        config, head = encoder_from_published(config_dict)
        translated = _fields_of(config)
        translated |= {name: getattr(head, name) for name in HEAD_FIELDS}
        if labels := reading_of(config_dict, head).labels:
            translated["id2label"] = dict(enumerate(labels))
        for key in ("dtype", "torch_dtype", "problem_type"):
            if config_dict.get(key) is not None:
                translated[key] = config_dict[key]
        return EncoderConfig.from_dict(translated, **kwargs)
