"""Makes transformers' Auto classes know this package's models."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nomatmul.models.causal_lm import CausalLM
from nomatmul.models.classifiers import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from nomatmul.models.encoder import Encoder
from nomatmul.models.hf.config import (
    CausalLMConfig,
    EncoderConfig,
    PublishedConfig,
    PublishedEncoderConfig,
)
from nomatmul.models.masked_lm import MaskedLM

_CAUSAL: dict[Any, Any] = {AutoModelForCausalLM: CausalLM}
_ENCODERS: dict[Any, Any] = {
    AutoModel: Encoder,
    AutoModelForMaskedLM: MaskedLM,
    AutoModelForSequenceClassification: EncoderForSequenceClassification,
    AutoModelForTokenClassification: EncoderForTokenClassification,
}


def register() -> None:
    """Register our model types and the published ones; doing it again changes nothing."""
    for own, published, table in (
        (CausalLMConfig, PublishedConfig, _CAUSAL),
        (EncoderConfig, PublishedEncoderConfig, _ENCODERS),
    ):
        for config in (own, published):
            AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in table.items():
            auto.register(own, model, exist_ok=True)
            # Only a name for transformers' table: published configs are translated before use.
            name = type(f"_Published{model.__name__}", (model,), {"config_class": published})
            auto.register(published, name, exist_ok=True)
    # Trainer's label smoothing shifts the labels of the classes in this table, and of no others.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CausalLMConfig.model_type] = CausalLM.__name__
