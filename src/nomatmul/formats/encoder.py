"""What an encoder has beyond its `ModelConfig`: defaults of its own, and classification heads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nomatmul.formats.config import ModelConfig

ENCODER_MODEL_TYPE = "nomatmul-encoder"
TASKS = ("masked", "sequence", "token")
POOLERS = ("avg", "zero_index", "max", "lse")
POOLER_ACTIVATIONS = ("tanh", "gelu", "relu", "silu")

# What a config.json of ours that leaves a field out means; crammed BERT (arXiv 2212.14034).
ENCODER_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 768,
    "num_layers": 16,
    "token_mixer": "attention",
    "channel_mixer": "ffn",
    "linear": "dense",
    "causal": False,
    "intermediate_size": 3072,
    "num_heads": 12,
    "max_position_embeddings": 128,
    "norm": "layer",
    "norm_eps": 1e-12,
    "positions": "sinusoidal",
    "embedding_norm": True,
    "tie_embeddings": True,
    "pad_token_id": 0,
}

# The task of a checkpoint, by the class that config.json names under "architectures".
TASK_OF_CLASS = {
    "MaskedLM": "masked",
    "EncoderForSequenceClassification": "sequence",
    "EncoderForTokenClassification": "token",
    "ScriptableLMForPreTraining": "masked",
    "ScriptableLMForSequenceClassification": "sequence",
    "ScriptableLMForTokenClassification": "token",
}


@dataclass(frozen=True)
class EncoderHead:
    """How an encoder is read by classification heads, and the dropouts of fine-tuning.

    pooler says how [B, T, D] becomes [B, D]: "avg", "max" and "lse" (log-sum-exp) over real tokens
    (over padding too if `pool_padding`, as crammed BERT's code does), "zero_index" the first token.
    A dense layer to `pooler_size` follows (None: none), and `pooler_activation`. hidden_dropout
    is for embeddings, attention and both sublayers, classifier_dropout for what the classifier
    reads; both only while a classification model is trained.

    Raises ValueError naming the value and what is legal.
    """

    pooler: str = "avg"
    pooler_size: int | None = 1024
    pooler_activation: str = "tanh"
    pool_padding: bool = False
    hidden_dropout: float = 0.1
    classifier_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, legal in (("pooler", POOLERS), ("pooler_activation", POOLER_ACTIVATIONS)):
            if getattr(self, name) not in legal:
                choices = ", ".join(map(repr, legal))
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; legal values are {choices}"
                )
        size = self.pooler_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"pooler_size must be a whole number above 0 or null, got {size!r}")
        if not isinstance(self.pool_padding, bool):
            raise ValueError(f"pool_padding must be true or false, got {self.pool_padding!r}")
        for name in ("hidden_dropout", "classifier_dropout"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not 0 <= value < 1:
                raise ValueError(f"{name} {value!r} must be a number in [0, 1)")

    @classmethod
    def of(cls, values: dict[str, Any]) -> EncoderHead:
        """The head described by a dict that may hold other keys as well."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})


HEAD_FIELDS = tuple(field.name for field in dataclasses.fields(EncoderHead))


def classifier_shapes(
    config: ModelConfig, head: EncoderHead, task: str, labels: int
) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a classification head; nothing for task "masked"."""
    if task == "masked":
        return {}
    size, shapes = config.hidden_size, dict[str, tuple[int, ...]]()
    if task == "sequence" and head.pooler_size is not None:
        shapes = {"pooler.weight": (head.pooler_size, size), "pooler.bias": (head.pooler_size,)}
        size = head.pooler_size
    return {**shapes, "classifier.weight": (labels, size), "classifier.bias": (labels,)}
