"""A training job of seconds: 2 layers of width 32 on generated text."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_jobs import make_text, tiny_config, train_here

from nomatmul.train import TrainConfig


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The directory of a run of one step; tests change only copies of it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train_here(tiny_config(steps=1), text_file, out)
    return out


@pytest.fixture
def config() -> TrainConfig:
    return tiny_config()
