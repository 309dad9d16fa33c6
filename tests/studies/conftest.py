"""Texts that the tests of the recipe study share."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest
from train_jobs import make_text

from studies.recipes import texts


@pytest.fixture(scope="session")
def recipe_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small texts, with what cleaning takes away, and of their tokens; copy it."""
    work = tmp_path_factory.mktemp("recipes") / "work"
    (work / "texts").mkdir(parents=True)
    for number, name in enumerate(texts.HELD_OUT):
        for part, length in (("train", 400), ("valid", 60)):
            text = "= Title =\nTwo  spaces () here.\n" + make_text(length, number)
            file = work / "texts" / f"{name}-{part}.txt.bz2"
            file.write_bytes(bz2.compress(text.encode()))
    texts._small_tokenizer(work)
    texts.prepare(work)
    return work
