"""config.json of a packed directory: the model, the forms of its matrices, an encoder's head."""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import MAX_LABELS, TASKS, EncoderHead, EncoderReading
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject, check_keys
from nomatmul.formats.packed.forms import Forms, legal_forms
from nomatmul.formats.packed.layout import check_packable
from nomatmul.formats.packed.version1 import upgraded

FORMAT = "nomatmul-packed"
FORMAT_VERSION = 2

# Of an EncoderHead; its dropouts are for training.
_HEAD_KEYS = ("pooler", "pooler_size", "pooler_activation", "pool_padding")

Described = tuple[ModelConfig, Forms, EncoderReading | None]


def describe(config: ModelConfig, forms: Forms, reading: EncoderReading | None) -> JsonObject:
    """What config.json says."""
    values: JsonObject = {"format": FORMAT, "format_version": FORMAT_VERSION}
    values["forms"] = forms.to_dict()
    if reading is not None:
        head = {key: getattr(reading.head, key) for key in _HEAD_KEYS}
        values["head"] = {"task": reading.task, "labels": list(reading.labels), **head}
    return {**values, "model": config.to_dict()}


def parse(values: JsonObject) -> Described:
    """(config, forms, reading: None of causal models) from the dict of config.json.

    Raises ValueError for another format, an unknown version, a key that is unknown or missing, or
    a model that cannot be packed.
    """
    if "format" not in values and "model_type" in values:
        raise FormatError("this model is not packed; `nomatmul pack` makes a packed one of it")
    values = upgraded(values)
    if values.get("format") != FORMAT:
        raise FormatError(f"format {values.get('format')!r} is not {FORMAT!r}")
    version = values.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FormatError(
            f"format_version {version!r} is unknown; this nomatmul reads versions 1 and"
            f" {FORMAT_VERSION}"
        )
    optional = {"head"} & set(values)
    check_keys("config key", values, {"format", "format_version", "forms", "model"} | optional)
    config = ModelConfig.from_dict(values["model"])
    reading = _parse_head(values["head"]) if optional else None
    check_packable(config, reading)
    given = values["forms"] if isinstance(values["forms"], dict) else {}
    check_keys("key of forms", values["forms"], set(legal_forms(config, given)))
    forms = Forms(**values["forms"])
    forms.check(config)
    return config, forms, reading


def _parse_head(values: JsonObject) -> EncoderReading:
    check_keys("key of head", values, {"task", "labels", *_HEAD_KEYS})
    task, labels = values["task"], values["labels"]
    if task not in TASKS:
        raise FormatError(f"task {task!r} is unknown; legal are {', '.join(TASKS)}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"labels must be a list of names, got {labels!r}")
    if (task == "masked") != (not labels) or len(labels) > MAX_LABELS:
        raise FormatError(f"task {task!r} does not go with {len(labels)} labels")
    return EncoderReading(task, EncoderHead.of(values), tuple(labels))
