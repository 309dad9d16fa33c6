"""Where a teacher lies and what can be said of it before its weights are read.

A teacher is any causal language model that transformers loads, or one of ours: a directory, that
of a training run, or a name on the Hub (hf:owner/name).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from nomatmul._hub_names import hub_advice, is_hub_name
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.weights import open_source
from nomatmul.formats.hub import local_path
from nomatmul.formats.runs import GGUF_SUFFIX, find_checkpoint
from nomatmul.models import CausalLMConfig
from nomatmul.train.manifest import model_sha256
from nomatmul.train.tokenizer import fingerprint, load_tokenizer

_INNER = ("intermediate_size", "n_inner", "ffn_dim")  # names of the channel mixer's width


@dataclasses.dataclass(frozen=True)
class TeacherSize:
    """rows: of its head; limit: tokens that it reads at once, or None.

    wide: its weights are float32 on a GPU, too (a model of ours).
    """

    parameters: int
    rows: int
    hidden: int
    intermediate: int
    limit: int | None
    wide: bool

    def absent(self) -> TeacherSize:
        """Of one whose logits come from a cache."""
        return dataclasses.replace(self, parameters=0, hidden=0, intermediate=0)


@dataclasses.dataclass(frozen=True)
class TeacherFiles:
    """A teacher on disk. path: as the user gave it; config: transformers' own."""

    path: str
    directory: Path
    config: Any
    tokenizer_file: Path
    size: TeacherSize

    @property
    def own(self) -> bool:
        """Is it a model of this package's?"""
        return isinstance(self.config, CausalLMConfig)

    @property
    def model_config(self) -> ModelConfig:
        """Of a model of ours."""
        return self.config.model_config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_file)

    @property
    def entries(self) -> int:
        """Of the tokenizer; the head may have more rows, which pad it."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def sha256(self) -> str:
        """Of its files."""
        return model_sha256(self.directory)

    def facts(self) -> dict[str, str]:
        """For run.json."""
        return {"path": self.path, "sha256": self.sha256}

    def tokenizer_of(self, given: str | None) -> str:
        """The tokenizer of a student: the teacher's. Raises ValueError for another one."""
        if given is not None and fingerprint(load_tokenizer(given)) != fingerprint(self.tokenizer):
            raise ValueError(
                f"{given} is not the tokenizer of teacher {self.path}, whose tokens its student "
                "predicts: leave it out"
            )
        return str(self.tokenizer_file)


def find_teacher(name: str) -> TeacherFiles:
    """The teacher of this name, downloaded if it is on the Hub; its weights are not read yet.

    Raises ValueError or OSError, in one line, for what is missing, no causal language model, or
    without a tokenizer.json; ImportError without huggingface_hub.
    """
    directory = _directory(name)
    values = _read_config(directory, name)
    if values.get("format") == "nomatmul-packed":
        raise ValueError(
            f"teacher {name} is packed: give the directory of its training run or its checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # classes of many authors look at sizes that anybody wrote
        raise ValueError(f"teacher {name}: {first_line(error)}") from error
    _check_kind(config, name)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"teacher {name} has no tokenizer.json, which its student needs; transformers writes "
            f"one: AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(...)"
        )
    found = TeacherFiles(name, directory, config, file, _size(directory, config))
    if found.entries > found.size.rows:
        raise ValueError(
            f"teacher {name}: its tokenizer has {found.entries} entries, its head only "
            f"{found.size.rows} rows"
        )
    return found


def _directory(name: str) -> Path:
    advice = hub_advice(name)
    if not is_hub_name(name) and not Path(name).exists() and advice:
        raise ValueError(f"teacher {name} does not exist{advice}")
    directory = find_checkpoint(local_path(name))
    if directory.suffix == GGUF_SUFFIX:
        raise ValueError(f"teacher {name} is a GGUF file: give a directory that transformers loads")
    return directory


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher {name}: cannot read config.json: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"teacher {name}: its config.json is no JSON object")
    return values


def _check_kind(config: Any, name: str) -> None:
    named = ", ".join(config.architectures or ()) or config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "MaskedLM" in named:
        raise ValueError(not_causal(name, named))


def not_causal(name: str, what: str) -> str:
    """The refusal of a model that is no causal language model."""
    return (
        f"teacher {name} ({what}) is an encoder or another kind of model: a teacher is a causal "
        "language model, which predicts each token from those before it"
    )


def _size(directory: Path, config: Any) -> TeacherSize:
    shapes = open_source(directory).shapes()
    text = config.get_text_config()
    if isinstance(config, CausalLMConfig):
        model = config.model_config
        limit = None if architecture_of(model).recurrent else model.max_position_embeddings
        rows, hidden, inner = model.vocab_size, model.hidden_size, model.intermediate_size or 0
    else:
        limit = getattr(text, "max_position_embeddings", None)
        limit = limit if limit and limit > 0 else None
        rows, hidden = (int(getattr(text, name, 0)) for name in ("vocab_size", "hidden_size"))
        inner = next(filter(None, (getattr(text, name, None) for name in _INNER)), 4 * hidden)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    wide = isinstance(config, CausalLMConfig)
    return TeacherSize(parameters, rows, hidden, inner, limit, wide)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
