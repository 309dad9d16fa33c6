"""What an encoder has beyond its `ModelConfig`: defaults of its own, and classification heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.tree_dials import TREE_ACTIVATIONS

ENCODER_MODEL_TYPE = "nomatmul-encoder"
TASKS = ("masked", "sequence", "token")
POOLERS = ("avg", "zero_index", "max", "lse")
MAX_LABELS = 1 << 20
POOLER_ACTIVATIONS = ("tanh", *TREE_ACTIVATIONS)

# What a config.json of ours that leaves a field out means; crammed BERT (arXiv 2212.14034).
ENCODER_DEFAULTS: JsonObject = {
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
    "Encoder": "masked",
    "ScriptableLM": "masked",
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
            if not number or not 0 <= value < 1:
                raise ValueError(f"{name} {value!r} must be a number in [0, 1)")

    @classmethod
    def of(cls, values: JsonObject) -> EncoderHead:
        """The head described by a dict that may hold other keys as well."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})


HEAD_FIELDS = tuple(field.name for field in dataclasses.fields(EncoderHead))


@dataclass(frozen=True)
class EncoderReading:
    """What an encoder's checkpoint is for.

    task is "masked", "sequence" or "token"; head describes the classification head, also where it
    is still to be trained; labels are the classes' names, empty for task "masked".
    """

    task: str
    head: EncoderHead
    labels: tuple[str, ...]


def reading_of(values: JsonObject, head: EncoderHead) -> EncoderReading:
    """Read from a config.json what the encoder is for. Raises ValueError for an unknown class."""
    names = values.get("architectures") or ["MaskedLM"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in TASK_OF_CLASS:
        raise ValueError(
            f"architectures {names!r} is unknown; legal is one of {', '.join(TASK_OF_CLASS)}"
        )
    task = TASK_OF_CLASS[names[0]]
    return EncoderReading(task, head, () if task == "masked" else _labels(values))


def _labels(values: JsonObject) -> tuple[str, ...]:
    """The classes' names: of `id2label`, else "LABEL_0" and so on as transformers names them."""
    names = values.get("id2label")
    if isinstance(names, dict) and names:
        try:
            found = {int(key): str(name) for key, name in names.items()}
        except ValueError:
            raise ValueError(f"id2label {names!r} must map numbers to names") from None
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"id2label {names!r} must name the labels 0..{len(found) - 1}")
        return tuple(found[label] for label in range(len(found)))
    arch = values.get("arch")
    count = values.get("num_labels", arch.get("num_labels") if isinstance(arch, dict) else None)
    if count is None:
        count = 2  # transformers' default, which it does not write
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MAX_LABELS:
        raise ValueError(f"num_labels {count!r} must be a whole number in 1..{MAX_LABELS}")
    return tuple(f"LABEL_{label}" for label in range(count))


def head_shapes(size: int, reading: EncoderReading) -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of a task's linears with a bias; none of the masked task."""
    wide, labels = reading.head.pooler_size, len(reading.labels)
    if reading.task == "masked":
        return {}
    if reading.task == "token" or wide is None:
        return {"classifier": (labels, size)}
    return {"pooler": (wide, size), "classifier": (labels, wide)}


def with_classifier(
    shapes: dict[str, tuple[int, ...]], config: ModelConfig, reading: EncoderReading
) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of an encoder for its task, from that of the masked model."""
    linears = head_shapes(config.hidden_size, reading)
    if not linears:
        return shapes
    kept = {name: shape for name, shape in shapes.items() if not name.startswith("head.")}
    for name, shape in linears.items():
        kept |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return kept
