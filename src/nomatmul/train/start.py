"""Weights that a run begins with: those of another run, or of any model of equal shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.runs import find_checkpoint
from nomatmul.train.manifest import model_sha256
from nomatmul.train.model import TrainedModel, no_progress_bars
from nomatmul.train.tokenizer import load_tokenizer

# What may differ: sizes that no weight has but the vocabulary's, and how weights are rounded.
_FREE = {
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
    "initializer_range", "linear", "head_linear", "linear_norm", "rounding", "scale_group",
    "split_gate",
}  # fmt: skip
_TABLES = ("embedding.weight", "head.weight")


@dataclasses.dataclass(frozen=True)
class Start:
    """A model on disk whose weights a run begins with. path: what the user named."""

    path: str
    checkpoint: Checkpoint
    sha256: str

    @classmethod
    def open(cls, path: str, model: ModelConfig) -> Start:
        """Raises ValueError or OSError for what is no model, and for one that does not fit.

        Tensors must have the shapes of `model`, whose vocabulary may be larger.
        """
        directory = find_checkpoint(Path(path))
        checkpoint = open_checkpoint(directory)
        if checkpoint.kind == "packed":
            raise ValueError(f"{path} is packed: a run starts from what it was packed from")
        _check_dials(path, checkpoint.config, model)
        _check_shapes(path, checkpoint, model)
        return cls(path, checkpoint, model_sha256(directory))

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    def facts(self) -> dict[str, str]:
        """For run.json."""
        return {"path": self.path, "sha256": self.sha256}

    def check_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Raises ValueError where a token of the model has another id in the run.

        None: the run would train a tokenizer of its own.
        """
        if self.checkpoint.tokenizer_path is None:
            if tokenizer is None:
                raise ValueError(f"{self.path} has no tokenizer.json: name one with --tokenizer")
            return
        assert tokenizer is not None  # `tokenizer_of` has named the model's own
        own = load_tokenizer(self.checkpoint.tokenizer_path).get_vocab(with_added_tokens=True)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        for token, number in sorted(own.items(), key=lambda item: item[1]):
            if ids.get(token) != number:
                now = f"id {ids[token]}" if token in ids else "none"
                raise ValueError(
                    f"token {token!r} has id {number} in {self.path}, and {now} in the run's "
                    "tokenizer: leave --tokenizer out, or give one that extends it"
                )

    def tokenizer_of(self, given: str | None, tokens: bool) -> str | None:
        """The tokenizer of a run: what was given, else the model's own.

        tokens: the data are token directories, which have their own.
        """
        path = self.checkpoint.tokenizer_path
        return given if given is not None or tokens or path is None else str(path)

    @torch.no_grad()
    def load(self, model: TrainedModel) -> None:
        """Copy the weights into `model`, which is whole; rows of new tokens stay as they are."""
        with no_progress_bars():
            loaded = type(model).from_pretrained(str(self.directory), latents=True)
        weights = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            if name in weights:
                tensor[: len(weights[name])] = weights[name]


def _check_dials(path: str, old: ModelConfig, new: ModelConfig) -> None:
    for field in dataclasses.fields(new):
        name = field.name
        if name not in _FREE and getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"{path} does not fit: its model.{name} is {getattr(old, name)!r}, "
                f"the run's {getattr(new, name)!r}"
            )
    if old.vocab_size > new.vocab_size:
        raise ValueError(
            f"{path} does not fit: its vocabulary of {old.vocab_size} is larger than "
            f"model.vocab_size {new.vocab_size}"
        )


def _check_shapes(path: str, checkpoint: Checkpoint, model: ModelConfig) -> None:
    wanted = architecture_of(model).tensors()
    for name in (*wanted, *checkpoint.names()):
        old = checkpoint.shape(name) if name in checkpoint.names() else None
        new = wanted.get(name)
        same = old == new
        if name in _TABLES and old is not None and new is not None:
            same = old[1:] == new[1:]  # a larger vocabulary
        if not same:
            raise ValueError(
                f"{path} does not fit: its tensor {name} is {_text(old)}, the run's {_text(new)}"
            )


def _text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
