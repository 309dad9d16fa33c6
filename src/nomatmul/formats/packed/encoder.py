"""The packed directory of an encoder: what it holds, its config.json, reader and writer.

The same container as that of a causal model (`layout`, docs/formats.md): one safetensors
file with checksums, config.json, tokenizer.json, a card. What differs is the config's "format"
and the tensors. Legend: V vocabulary, D hidden size, M intermediate size, N/K rows and columns
of a dense matrix, R rows of an FFF (nodes of all trees), C classes, P size of the pooler.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import MAX_LABELS, TASKS, EncoderHead, EncoderReading
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.files.safetensors import SafetensorsFile
from nomatmul.formats.packed import layout
from nomatmul.formats.packed.reader import PackedReader, _read_file
from nomatmul.formats.packed.writer import PackedWriter
from nomatmul.formats.quantise import from_bfloat16

FORMAT = "nomatmul-packed-encoder"
FORMAT_VERSION = 1
FORMS = ("f32", "bf16", "int8")

_CONFIG_KEYS = {"format", "format_version", "forms", "head", "model"}
# Of an EncoderHead; its dropouts are for training.
_HEAD_KEYS = ("pooler", "pooler_size", "pooler_activation", "pool_padding")
_DTYPES = {"f32": "F32", "bf16": "BF16", "int8": "I8"}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Forms:
    """How weights are stored: rows of FFFs, dense matrices, embedding; each of FORMS.

    int8 has one float32 scale a row (two a row of an FFF: input and output weights), and its
    dense products take int8 inputs too (docs/numerics.md). Raises ValueError for another form.
    """

    rows: str = "f32"
    dense: str = "f32"
    embedding: str = "f32"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value not in FORMS:
                raise ValueError(f"{name} form {value!r} is unknown; legal are {', '.join(FORMS)}")


def check_encoder(config: ModelConfig) -> None:
    """Raise ValueError, naming the part, for a model that no packed encoder can hold."""
    if config.causal:
        raise ValueError("a packed encoder is not causal, this model is")
    capability.check(config, "packed")


def encoder_tensors(config: ModelConfig, forms: Forms, reading: EncoderReading) -> Tensors:
    """Return {name: (safetensors dtype, shape)} in the order in which the file holds them.

    Matrices and rows by layer, then float32 vectors, the embedding last.
    Raises ValueError for a model that is no encoder of ours.
    """
    check_encoder(config)
    matrices: Tensors = {}
    vectors: Tensors = {}
    for name, shape in dense_shapes(config, reading).items():
        matrices[f"{name}.weight"] = (_DTYPES[forms.dense], shape)
        if forms.dense == "int8":
            vectors[f"{name}.scale"] = ("F32", shape[:1])
    for name in fff_names(config):
        rows = config.tree_rows
        matrices[f"{name}.rows"] = (_DTYPES[forms.rows], (rows, 2, config.hidden_size))
        if forms.rows == "int8":
            vectors[f"{name}.row_scale"] = ("F32", (rows, 2))
        if config.fff_bias:
            vectors[f"{name}.bias"] = ("F32", (rows,))
    vectors |= {
        name: ("F32", shape) for name, shape in architecture_of(config).norm_tensors().items()
    }
    if config.positions == "sinusoidal":
        vectors["position_scale"] = ("F32", (1,))
    if pooler_size(reading):
        vectors["pooler.bias"] = ("F32", (pooler_size(reading),))
    if reading.task != "masked":
        vectors["classifier.bias"] = ("F32", (len(reading.labels),))
    if forms.embedding == "int8":
        vectors["embedding.scale"] = ("F32", (config.vocab_size,))
    table = (config.vocab_size, config.hidden_size)
    return {**matrices, **vectors, "embedding.weight": (_DTYPES[forms.embedding], table)}


def dense_shapes(config: ModelConfig, reading: EncoderReading) -> dict[str, tuple[int, int]]:
    """Return {name: (rows, columns)} of the dense matrices; q, k and v are one, in this order."""
    size, shapes = config.hidden_size, {}
    for layer in range(config.num_layers):
        at, kind = f"layers.{layer}.channel", config.channel_of(layer)
        shapes[f"layers.{layer}.mixer.qkv_proj"] = (3 * size, size)
        shapes[f"layers.{layer}.mixer.o_proj"] = (size, size)
        inner = {"glu": config.mlp_size, "ffn": config.mlp_size, "fff": config.fff_master_width}
        first = {"glu": "gate_proj", "ffn": "up_proj", "fff": "master.up_proj"}
        if inner.get(kind):
            rows = (2 if kind == "glu" else 1) * inner[kind]
            shapes[f"{at}.{first[kind]}"] = (rows, size)
            last = "master.down_proj" if kind == "fff" else "down_proj"
            shapes[f"{at}.{last}"] = (size, inner[kind])
    if reading.task == "masked" and not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, size)
    if pooler_size(reading):
        shapes["pooler"] = (pooler_size(reading), size)
    if reading.task != "masked":
        shapes["classifier"] = (len(reading.labels), pooler_size(reading) or size)
    return shapes


def pooler_size(reading: EncoderReading) -> int:
    """Rows of the dense layer in front of a sequence classifier, 0 where there is none."""
    return (reading.head.pooler_size or 0) if reading.task == "sequence" else 0


def fff_names(config: ModelConfig) -> list[str]:
    """Names of the FFF layers: "layers.0.channel", ..."""
    return list(architecture_of(config).trees())


def encoder_config_dict(
    config: ModelConfig, forms: Forms, reading: EncoderReading
) -> dict[str, Any]:
    """Return what config.json of a packed encoder says."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "forms": asdict(forms),
        "head": {
            "task": reading.task,
            "labels": list(reading.labels),
            **{key: getattr(reading.head, key) for key in _HEAD_KEYS},
        },
        "model": config.to_dict(),
    }


def parse_encoder_config(values: dict[str, Any]) -> tuple[ModelConfig, Forms, EncoderReading]:
    """Return what `encoder_config_dict` was given.

    Raises ValueError for another format, an unknown version, or keys unknown or missing.
    """
    if values.get("format") != FORMAT:
        raise FormatError(f"format {values.get('format')!r} is not {FORMAT!r}")
    version = values.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FormatError(
            f"format_version {version!r} is unknown; this nomatmul reads version {FORMAT_VERSION}"
        )
    _check_keys("config key", values, _CONFIG_KEYS)
    _check_keys("key of forms", values["forms"], set(Forms.__dataclass_fields__))
    _check_keys("key of head", values["head"], {"task", "labels", *_HEAD_KEYS})
    config = ModelConfig.from_dict(values["model"])
    check_encoder(config)
    return config, Forms(**values["forms"]), _parse_head(values["head"])


def _parse_head(values: dict[str, Any]) -> EncoderReading:
    task, labels = values["task"], values["labels"]
    if task not in TASKS:
        raise FormatError(f"task {task!r} is unknown; legal are {', '.join(TASKS)}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"labels must be a list of names, got {labels!r}")
    if (task == "masked") != (not labels) or len(labels) > MAX_LABELS:
        raise FormatError(f"task {task!r} does not go with {len(labels)} labels")
    return EncoderReading(task, EncoderHead.of(values), tuple(labels))


def _check_keys(what: str, values: Any, legal: set[str]) -> None:
    if not isinstance(values, dict):
        raise FormatError(f"{what}: a JSON object is needed, found {type(values).__name__}")
    unknown, missing = set(values) - legal, legal - set(values)
    if unknown or missing:
        word, key = ("unknown", min(unknown)) if unknown else ("missing", min(missing))
        raise FormatError(f"{word} {what} {key!r}")


def is_packed_encoder(directory: str | Path) -> bool:
    """Whether a directory's config.json says that it is a packed encoder; False where it is none.

    Damage is for the reader to tell.
    """
    path = Path(directory) / layout.CONFIG_FILE
    try:
        return read_json_object(path).get("format") == FORMAT
    except FormatError:
        return False


class EncoderReader(PackedReader):
    """A packed encoder's directory, its small parts verified; tensors are checked when read.

    config: ModelConfig. forms: Forms. reading: EncoderReading (without dropouts). Raises
    FormatError (a ValueError) for anything missing, damaged, foreign or unknown.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        config_path = self.directory / layout.CONFIG_FILE
        config_bytes = _read_file(config_path)
        values = read_json_object(config_path, config_bytes)
        try:
            self.config, self.forms, self.reading = parse_encoder_config(values)
        except (ValueError, TypeError) as error:
            raise FormatError(f"{config_path}: {error}") from None
        self.packing, self.embedding_form = "none", self.forms.embedding
        self.weights_path = self.directory / layout.WEIGHTS_FILE
        self._file = SafetensorsFile(self.weights_path)
        self.infos = self._file.infos
        self._check_metadata(config_bytes)
        self._check_shapes()
        self.matrices = {}

    def _expected(self) -> Tensors:
        return encoder_tensors(self.config, self.forms, self.reading)

    def verify(self, name: str, buffer: Any, codes: bool = True) -> None:
        super().verify(name, buffer, codes)
        if name.endswith(".row_scale"):
            values = np.frombuffer(buffer, np.float32)
            if not np.all(values > 0):
                raise FormatError(
                    f"{self.weights_path}: {name} must be above 0, found {values.min()}"
                )

    def read_float32(self, name: str) -> NDArray[np.float32]:
        """Return a verified tensor as float32: bfloat16 and int8 expanded to their values."""
        dtype, stored = self._file.info(name).dtype, self.read(name)
        if dtype == "BF16":
            return from_bfloat16(stored)
        if dtype != "I8":
            return stored
        scale = self.read(
            name.replace(".rows", ".row_scale")
            if name.endswith(".rows")
            else name.replace(".weight", ".scale")
        )
        return stored.astype(np.float32) * scale[..., None]


class EncoderWriter(PackedWriter):
    """Writes a packed encoder's directory tensor by tensor, as `PackedWriter` does."""

    def __init__(
        self,
        dst: str | Path,
        config: ModelConfig,
        forms: Forms,
        reading: EncoderReading,
        tokenizer_path: str | Path | None,
        readme: str,
    ) -> None:
        self._temporary = None
        self._file = None
        self.packing, self.embedding_form = "none", forms.embedding
        self._matrices = {}
        document = encoder_config_dict(config, forms, reading)
        tensors = encoder_tensors(config, forms, reading)
        self._start(dst, tensors, document, tokenizer_path, readme, config)
