"""Opening a model directory of any kind: published, our own training checkpoint, or packed.

`open_checkpoint` answers with our config and our tensor names whatever lies on disk, and reads
one tensor (or some rows of one) at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul._hub_names import hub_advice
from nomatmul.formats import encoder
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject, read_json_object
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.weights import TensorSource, open_source
from nomatmul.formats.files.wrappers import missing_tensor, unwrapped
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.formats.packed.source import PackedEncoderSource
from nomatmul.formats.published import crammed_bert, hgrn_bit
from nomatmul.formats.published.crammed_bert_source import EncoderSource
from nomatmul.formats.published.gguf import open_gguf
from nomatmul.formats.published.keys import HARMLESS_KEYS, end_tokens
from nomatmul.formats.published.llama_form import Form
from nomatmul.formats.published.llama_source import (
    FAMILIES,
    REFUSED,
    LlamaSource,
    check_config,
    open_family,
)
from nomatmul.formats.runs import gguf_file
from nomatmul.formats.tokenizer import find_tokenizer_file
from nomatmul.formats.trained import STORED_KEY, TrainedSource

TRAINING_MODEL_TYPE = "nomatmul"
_BLOCK_ELEMENTS = 1 << 22


class Checkpoint:
    """A model on disk, seen through our own names.

    `kind` is "published", "training" or "packed"; `config` a ModelConfig; `reading` says what an
    encoder is for, None for decoders. Tensors of a packed decoder are named as stored there (see
    docs/formats.md) and `packed` holds its reader; a packed encoder is opened as what it was packed
    from, a "training" one of the values that it was rounded to. `ignored` names the
    keys of its config.json that nobody here knows, `found` (of Llama's shape) how weights are
    ternary, `metadata` (of a GGUF file) what else the file says.
    """

    ignored: tuple[str, ...] = ()
    found: Form | None = None
    metadata: dict[str, Any] | None = None

    def __init__(
        self,
        directory: Path,
        kind: str,
        config: ModelConfig,
        source: TensorSource | None,
        packed: PackedReader | None = None,
        reading: encoder.EncoderReading | None = None,
    ) -> None:
        self.directory = directory
        self.kind = kind
        self.config = config
        self.packed = packed
        self.reading = reading
        self._source = source
        self._stored_names: dict[str, str] = {}
        if source is not None:
            self._shapes = architecture_of(config).tensors()
            if reading is not None:
                self._shapes = encoder.with_classifier(self._shapes, config, reading)
            self._map_names(source)
        else:
            assert packed is not None
            self._shapes = {name: info.shape for name, info in packed.infos.items()}

    def _map_names(self, source: TensorSource) -> None:
        """Pair our names with the stored ones; refuse what is missing, extra or misshapen."""
        decoder = self.kind == "published" and self.reading is None
        ours = isinstance(source, LlamaSource)
        translate = hgrn_bit.published_name if decoder and not ours else str
        if self.kind == "published" and self.reading is not None:
            source = unwrapped(source, EncoderSource.anchors(), self.directory)
            source = EncoderSource(source, self.config, self._shapes)
        elif not ours:
            source = unwrapped(source, [translate("embedding.weight")], self.directory)
            if not decoder and self.reading is None:
                source = TrainedSource(source, self.config)
        self._source = source
        stored = source.shapes()
        self._stored_names = {name: translate(name) for name in self._shapes}
        tied_head = translate("head.weight")
        for name, other in self._stored_names.items():
            if other not in stored:
                raise FormatError(f"{self.directory}: {missing_tensor(source, other)}")
            if stored[other] != self._shapes[name]:
                raise FormatError(
                    f"{self.directory}: {other!r} has shape {list(stored[other])}, the config"
                    f" asks for {list(self._shapes[name])}"
                )
        extra = set(stored) - set(self._stored_names.values())
        if self.config.tie_embeddings and tied_head in extra:
            self._check_tied(source, tied_head)
            extra.discard(tied_head)
        if decoder and not self.config.use_lower_bound:
            extra.discard("model.lower_bounds")  # the authors' code ignores it as well
        if extra:
            raise FormatError(f"{self.directory} holds the unknown tensor {min(extra)!r}")

    def _check_tied(self, source: TensorSource, stored_head: str) -> None:
        """A tied head that is stored nevertheless must be the embedding, or one of them lies."""
        embedding = self._stored_names["embedding.weight"]
        shape = self._shapes["embedding.weight"]
        equal = source.shapes()[stored_head] == shape and all(
            np.array_equal(source.read(stored_head, rows), source.read(embedding, rows))
            for rows in _row_slices(shape)
        )
        if not equal:
            raise FormatError(
                f"{self.directory}: the config ties the head to the embedding, but"
                f" {stored_head!r} differs from {embedding!r}"
            )

    @property
    def tokenizer_path(self) -> Path | None:
        """The directory's tokenizer.json, if it has one."""
        return find_tokenizer_file(self.directory)

    def names(self) -> list[str]:
        """Return the names of the tensors; a tied head has no "head.weight" among them."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raises ValueError for an unknown name."""
        return self._shapes[self._known(name)]

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or the rows `rows` of it, as finite float32.

        "head.weight" of a tied model is the embedding. Raises ValueError for an unknown name,
        for damage and for values that are not finite.
        """
        name = self._known(name)
        if self._source is None:
            assert self.packed is not None
            values = self.packed.read_float32(name)
            return values if rows is None else values[rows]
        return self._source.read(self._stored_names[name], rows)

    def quantised(self, name: str) -> Quantised | None:
        """The whole numbers and scales of a matrix that came with them; None for floats, and in a
        packed directory, whose reader has its own.

        Raises ValueError for an unknown name, for damage, and for scales that are none.
        """
        name = self._known(name)
        return None if self._source is None else self._source.quantised(self._stored_names[name])

    def read_blocks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Yield a matrix in blocks of rows, so that a large one need not fit in memory."""
        for rows in _row_slices(self.shape(name)):
            yield self.read(name, rows)

    def _known(self, name: str) -> str:
        if name == "head.weight" and self.kind != "packed" and self.config.tie_embeddings:
            return "embedding.weight"
        if name not in self._shapes:
            raise ValueError(f"{self.directory} has no tensor {name!r}")
        return name


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a model of any kind that we know: a directory, or a GGUF file (or its directory).

    Raises FormatError, in one line, for a directory that is missing, foreign, damaged, or that
    holds an option this version does not understand.
    """
    directory = Path(directory)
    if (gguf := gguf_file(directory)) is not None:
        return _open_gguf(gguf)
    if not directory.is_dir():
        if directory.exists():
            raise FormatError(f"{directory} is not a directory; a model has a config.json in one")
        advice = hub_advice(directory) or "; a model is a directory with a config.json"
        raise FormatError(f"{directory} does not exist{advice}")
    values = read_json_object(directory / "config.json")
    if "format" in values:
        reader = PackedReader(directory)
        if reader.reading is not None:
            source = PackedEncoderSource(reader)
            return Checkpoint(directory, "training", reader.config, source, reading=reader.reading)
        return Checkpoint(directory, "packed", reader.config, None, reader)
    return _named(directory, lambda: _open_unpacked(directory, values))


def _open_gguf(path: Path) -> Checkpoint:
    values, stored = open_gguf(path)
    checkpoint = _named(path, lambda: _published_lm(path, values, stored))
    checkpoint.metadata = stored.file.metadata
    return checkpoint


def _published_lm(directory: Path, values: JsonObject, stored: TensorSource) -> Checkpoint:
    config, source = open_family(values, stored, directory)
    config = _with_generation_ends(config, directory / GENERATION_FILE)
    checkpoint = Checkpoint(directory, "published", config, source)
    checkpoint.ignored, checkpoint.found = source.ignored, source.form
    return checkpoint


def _named(path: Path, opened: Callable[[], Checkpoint]) -> Checkpoint:
    """What opens; an error says of which file it speaks."""
    try:
        return opened()
    except FormatError as error:
        if str(path) in str(error):
            raise
        raise FormatError(f"{path}: {error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def _open_unpacked(directory: Path, values: JsonObject) -> Checkpoint:
    model_type, reading = values.get("model_type"), None
    if not isinstance(model_type, str):
        raise _unknown(model_type)
    if model_type in FAMILIES:
        check_config(values)  # before its weights are looked at
        return _published_lm(directory, values, open_source(directory))
    if model_type == hgrn_bit.MODEL_TYPE:
        config, kind = hgrn_bit.config_from_published(values), "published"
    elif model_type == crammed_bert.MODEL_TYPE:
        config, head = crammed_bert.encoder_from_published(values)
        reading, kind = encoder.reading_of(values, head), "published"
    elif model_type == TRAINING_MODEL_TYPE:
        config, kind = config_from_training(values), "training"
    elif model_type == encoder.ENCODER_MODEL_TYPE:
        config, kind = config_from_training(values), "training"
        reading = encoder.reading_of(values, encoder.EncoderHead.of(values))
    elif model_type in REFUSED:
        raise FormatError(
            f"model_type {model_type!r} is not supported yet: it needs {REFUSED[model_type]}"
        )
    else:
        raise _unknown(model_type)
    if reading is None:
        config = _with_generation_ends(config, directory / GENERATION_FILE)
    checkpoint = Checkpoint(directory, kind, config, open_source(directory), reading=reading)
    if kind == "published":
        family = hgrn_bit if reading is None else crammed_bert
        checkpoint.ignored = family.ignored_keys(values)
    return checkpoint


def _unknown(model_type: object) -> FormatError:
    legal = (
        *(TRAINING_MODEL_TYPE, encoder.ENCODER_MODEL_TYPE, hgrn_bit.MODEL_TYPE),
        *(*FAMILIES, crammed_bert.MODEL_TYPE),
    )
    return FormatError(
        f"model_type {model_type!r} is unknown; legal are {', '.join(map(repr, legal))} and packed"
        " directories"
    )


def _with_generation_ends(config: ModelConfig, path: Path) -> ModelConfig:
    """The config with the end tokens that only generation_config.json names.

    Chat models often name the end of a document in config.json and the end of an answer there.
    """
    if not path.exists():
        return config
    more = end_tokens(read_json_object(path).get("eos_token_id"))
    if more is None:
        return config
    more = more if isinstance(more, tuple) else (more,)
    try:
        return dataclasses.replace(config, eos_token_id=(*config.end_token_ids, *more))
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def config_from_training(values: JsonObject) -> ModelConfig:
    """Translate the config.json of our own training checkpoint.

    It holds the fields of ModelConfig, "model_type": "nomatmul" or "nomatmul-encoder", and
    whatever harmless keys the Hugging Face classes add. Raises ValueError naming an unknown key or
    an illegal value.
    """
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    dropped = {"model_type", "tie_word_embeddings", STORED_KEY, *HARMLESS_KEYS}
    if values.get("model_type") == encoder.ENCODER_MODEL_TYPE:
        dropped |= {"num_labels", *encoder.HEAD_FIELDS}
        values = {**encoder.ENCODER_DEFAULTS, **values}
    kept = {key: value for key, value in values.items() if key in fields or key not in dropped}
    tied = values.get("tie_word_embeddings")
    if tied is not None and tied != kept.setdefault("tie_embeddings", tied):
        raise ValueError(
            f"tie_word_embeddings {tied!r} contradicts tie_embeddings {kept['tie_embeddings']!r}"
        )
    return ModelConfig.from_dict(kept)


def _row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    width = int(np.prod(shape[1:], dtype=np.int64)) or 1
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))
