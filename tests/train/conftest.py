"""A training job of seconds: 2 layers of width 32 on generated text."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("transformers", reason="training needs the extra `train`")

from nomatmul.formats.config import ModelConfig  # noqa: E402
from nomatmul.train import TrainConfig  # noqa: E402

WORDS = "the river runs under an old stone bridge where 3 boats wait for morning light"


def make_text(words: int, seed: int = 0) -> str:
    choose = random.Random(seed)
    lines = [" ".join(choose.choices(WORDS.split(), k=9)) + ".\n" for _ in range(words // 9)]
    return "".join(lines)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


@pytest.fixture
def config() -> TrainConfig:
    return tiny_config()


def tiny_config(**changes: object) -> TrainConfig:
    """12 steps; changes replace fields."""
    model = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, intermediate_size=64)
    values: dict = {
        "recipe": "tiny",
        "model": model,
        "sequence_length": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "valid_fraction": 0.05,
        "log_interval": 2,
        "eval_interval": 6,
        "eval_tokens": 200,
        "sample_interval": 0,
        "diagnostics_interval": 6,
        "checkpoint_interval": 3,
        "checkpoint_seconds": 0.0,
    }
    return TrainConfig(**(values | changes))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two busy cores: a second thread costs more than it gives, and the sums stay the same."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
