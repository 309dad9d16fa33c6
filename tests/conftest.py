"""Fixtures that all rooms' tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before numpy and torch start their threads, and for the processes that tests start: the tests'
# sums are small, and threads that wait for each other in a loop starve a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings
from machine import need_triton
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support import warm

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
# With --base: files whose imports need the extras `train` or `serve`. Single tests are marked
# `train`.
TRAIN_ONLY = (
    *("serve/*", "ray/*"),
    "hardware/*",  # of the extra `hardware`
    *("models/*", "ops/*", "train/*", "finetune/*", "gpu/*", "benchmarks/*", "studies/*"),
    *(
        "engine/test_*cuda*.py",
        "*/test_*torch*.py",
        "evaluate/test_compare.py",
        "evaluate/test_compare_c*.py",
        "convert/test_hub.py",  # of the extra `hub`, which goes with that
        "evaluate/test_harness.py",  # of `eval`
    ),
)

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests never time: a slow machine must not fail them.
settings.register_profile("nomatmul", deadline=None, print_blob=True)
settings.load_profile("nomatmul")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --base: the tests that the base install can run, which has no torch; and --ray."""
    parser.addoption("--base", action="store_true", help="leave out what needs the extra `train`")
    parser.addoption("--ray", action="store_true", help="with tests/ray (the extra `serve-ray`)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files of TRAIN_ONLY where --base asks for it, and tests/ray without --ray."""
    name = collection_path.relative_to(HERE) if HERE in collection_path.parents else Path()
    if name.match("ray/*.py") and not config.getoption("--ray"):
        return True
    if config.getoption("--base") and any(name.match(pattern) for pattern in TRAIN_ONLY):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `train` where --base asks for it."""
    if config.getoption("--base"):
        left = [item for item in items if item.get_closest_marker("train")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """Torch's threads, which scripts and trainings set for their process, are one in each test."""
    yield
    torch = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):  # neither absent nor blocked
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A published decoder of 2 layers, made by the authors' code (tests/golden/README.md)."""
    return GOLDEN / "hgrn_bit-tiny"


@pytest.fixture(scope="session")
def crammed_tiny() -> Path:
    """A published encoder of 2 FFF layers, made by the authors' code."""
    return GOLDEN / "crammedbert-fff-tiny"


@pytest.fixture(scope="session")
def sentencepiece_file() -> Path:
    """The published SentencePiece vocabulary of 32,000 entries."""
    return GOLDEN / "mistral" / "tokenizer.model"


@pytest.fixture(scope="session")
def golden(tiny: Path) -> dict[str, NDArray[np.generic]]:
    """What the authors' kernels computed from `tiny`: input_ids, attention_mask, logits, and
    hidden.0 (embedding output), hidden.1, hidden.2 (outputs of the blocks, before the final norm).
    """
    return load_file(tiny / "golden.safetensors")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20240604)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python whose processes have imported what trains; torch compiles nothing in them."""
    folder, environment = tmp_path_factory.mktemp("warm"), {"TORCH_COMPILE_DISABLE": "1"}
    with warm.python(folder, ("nomatmul.train.job",), environment) as python:
        yield python


@pytest.fixture(scope="session")
def interpreting_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python whose processes have imported torch, our models and triton with its interpreter.

    In processes of their own, since triton reads TRITON_INTERPRET when it is imported.
    """
    need_triton()
    folder, environment = tmp_path_factory.mktemp("interpreter"), {"TRITON_INTERPRET": "1"}
    with warm.python(folder, ("nomatmul.models", "triton"), environment) as python:
        yield python
