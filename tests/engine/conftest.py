"""Small models of awkward sizes: no dimension is a multiple of a kernel's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG
from model_files import write_packed, write_training

from nomatmul.engine import LanguageModel, load, random_model
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig


@pytest.fixture(params=["2bit", "1.6bit"])
def packing(request: pytest.FixtureRequest) -> str:
    """Both forms of packed weights."""
    return request.param


@pytest.fixture
def lm(packing: str) -> LanguageModel:
    """A random model in memory, two threads."""
    return random_model(CONFIG, packing, "int8", seed=5, threads=2)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: ids 0..255 are bytes in the tokenizer's order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def make_packed(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path
) -> Callable[..., Path]:
    """make_packed(config, packing, embedding_form) -> a packed directory with a tokenizer."""
    made: dict[tuple[object, ...], Path] = {}

    def make(
        config: ModelConfig = CONFIG, packing: str = "2bit", embedding_form: str = "bf16"
    ) -> Path:
        key = (config, packing, embedding_form)
        if key not in made:
            base = tmp_path_factory.mktemp("model")
            write_training(base / "training", config, np.random.default_rng(1))
            checkpoint = open_checkpoint(base / "training")
            write_packed(base / "packed", checkpoint, packing, embedding_form, byte_tokenizer)
            made[key] = base / "packed"
        return made[key]

    return make


@pytest.fixture(scope="session")
def packed(make_packed: Callable[..., Path]) -> Path:
    """One packed directory that no test changes."""
    return make_packed()


@pytest.fixture(scope="session")
def text_lm(packed: Path) -> LanguageModel:
    """That directory, loaded."""
    return load(packed, threads=2)
