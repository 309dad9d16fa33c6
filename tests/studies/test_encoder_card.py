"""The card of the encoder in the box: written by the script, from the rows that lie beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomatmul.engine.loading import ENCODER_BOX
from studies.box import ship

ROOT = Path(__file__).resolve().parents[2]
SCORES = ROOT / "benchmarks" / "results" / "2026-12-01-recipes-encoder"


def _words(data: Path, to: Path) -> list[str]:
    """The command line that ships the packed encoder again."""
    authors = data / ship.AUTHORS
    authors.parent.mkdir(parents=True)
    lines = (ENCODER_BOX / "storybooks.tsv").read_text("utf-8").splitlines()
    authors.write_text("".join(f"file.md\t{line}\n" for line in lines), "utf-8")
    return ["--packed", str(ENCODER_BOX), "--to", str(to), "--data", str(data),
            "--scores", str(SCORES)]  # fmt: skip


def test_the_card_is_what_the_script_writes(tmp_path):
    to = tmp_path / "package" / "box-encoder"
    to.mkdir(parents=True)
    ship.main(_words(tmp_path / "data", to))
    for file in ENCODER_BOX.iterdir():
        assert (to / file.name).read_bytes() == file.read_bytes(), file.name


def test_all_models_together_have_a_limit(tmp_path):
    to, base = tmp_path / "package" / "box-encoder", tmp_path / "package" / "box"
    base.mkdir(parents=True)
    with open(base / "model.safetensors", "wb") as file:
        file.truncate(ship.TOTAL - 5_000_000)
    with pytest.raises(ValueError, match="the models of the package would have 30,9"):
        ship.main(_words(tmp_path / "data", to))
    assert [path.name for path in to.parent.iterdir()] == ["box"]
