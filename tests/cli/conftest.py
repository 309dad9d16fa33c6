"""A small model in each form, made once; the commands are run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from model_files import write_tokenizer, write_training

from nomatmul import cli
from nomatmul.formats.config import ModelConfig

CONFIG = ModelConfig(vocab_size=48, hidden_size=32, num_layers=2, intermediate_size=40)


@pytest.fixture(scope="session")
def training(tmp_path_factory) -> Path:
    """A training checkpoint with a tokenizer of the words w0 ... w39."""
    directory = tmp_path_factory.mktemp("models") / "training"
    write_training(directory, CONFIG, np.random.default_rng(3))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def packed(training) -> Path:
    """The packed form of `training`."""
    directory = training.with_name("packed")
    assert cli.main(["pack", str(training), str(directory), "--no-check", "--json"]) == 0
    return directory


@pytest.fixture
def text(tmp_path) -> Path:
    """A text of 60 words that the tokenizer knows."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{(7 * i) % 40}" for i in range(60)))
    return path


class Done(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process; its errors are asked for as users see them."""
    monkeypatch.delenv("NOMATMUL_DEBUG", raising=False)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return run
