"""A model with other threads is of the same weights, in the same memory."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from random_packed import FAMILIES, family, write_random
from test_engine_threads import in_child

from nomatmul.engine import LanguageModel, load

IDS = [1, 5, 2, 8, 3, 3, 7, 11, 28, 0]


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """What earlier tests have left is not looked through by each `gc.collect()`."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_read_again_and_either_may_go_first(
    tmp_path: Path, name: str, mmap: bool
) -> None:
    write_random(tmp_path / "model", *family(name))
    lm = load(tmp_path / "model", threads=1, mmap=mmap)
    expected = lm.logits(IDS)
    shutil.rmtree(tmp_path / "model")
    two = lm.with_threads(2)
    three = two.with_threads(3)
    assert [model.backend.threads for model in (lm, two, three)] == [1, 2, 3]
    assert two.backend.weight_bytes() == lm.backend.weight_bytes()
    np.testing.assert_array_equal(two.logits(IDS), expected)
    del two
    gc.collect()
    np.testing.assert_array_equal(lm.logits(IDS), expected)
    del lm
    gc.collect()
    np.testing.assert_array_equal(three.logits(IDS), expected)
    np.testing.assert_array_equal(three.with_threads(1).logits(IDS), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_of_a_shared_model_goes_on(lm: LanguageModel) -> None:
    expected = lm.logits(IDS).tobytes()
    other = lm.with_threads(3)
    other.logits(IDS)
    assert in_child(lambda: other.logits(IDS).tobytes()) == expected
    assert in_child(lambda: lm.logits(IDS).tobytes()) == expected
    assert other.logits(IDS).tobytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the memory in use")
def test_there_is_one_copy_in_memory() -> None:
    code = """
import gc
from pathlib import Path
from nomatmul.engine import random_model
from nomatmul.formats.config import ModelConfig

def resident():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

config = ModelConfig(
    vocab_size=30000, hidden_size=1024, num_layers=8, num_heads=16, token_mixer="attention",
    use_lower_bound=False, max_position_embeddings=64, linear_norm="none", scale_group=32,
    head_linear="dense",
)
lm = random_model(config, head="int8-32", embedding="int8-32", threads=1)
lm.session().append([1, 2, 3])
weights, before = lm.footprint()["weights"], resident()
others = [lm.with_threads(threads) for threads in (1, 2)]
for other in others:
    other.session().append([1, 2, 3])
print(weights > 60e6, resident() - before < weights / 8, resident() - before, weights)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("True True"), (done.stdout, done.stderr)
