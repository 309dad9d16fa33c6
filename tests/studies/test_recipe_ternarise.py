"""Models are scored on the scale between a teacher and a control."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nomatmul.formats.config import ModelConfig
from nomatmul.train import TrainConfig, run
from studies.recipes import ternarise as study


def test_models_are_scored_on_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{(7 * at * at + at) % 40}" for at in range(4000)]
    text = "\n<|endoftext|>\n".join(" ".join(words[at : at + 80]) for at in range(0, 4000, 80))
    (tmp_path / "text.txt").write_text(text)
    model = ModelConfig(
        vocab_size=280, hidden_size=16, num_layers=1, intermediate_size=16, linear="dense",
        token_mixer="attention", max_position_embeddings=64,
    )  # fmt: skip
    for name, steps in (("teacher", 30), ("control", 1)):
        config = TrainConfig(
            recipe="tiny", model=model, sequence_length=16, batch_size=4, micro_batch_size=4,
            steps=steps, warmup_steps=1, eval_interval=0, sample_interval=0, diagnostics_interval=0,
        )  # fmt: skip
        run(config, [str(tmp_path / "text.txt")], tmp_path / name, workers=1, device="cpu",
            quiet=True)  # fmt: skip
    monkeypatch.setattr(study, "TEXTS", 2)
    monkeypatch.setattr(study, "LENGTH", 12)
    place = str(tmp_path / "text.txt")
    monkeypatch.setattr(sys, "argv", [
        "ternarise", "--teacher", str(tmp_path / "teacher"), "--control",
        str(tmp_path / "control"), "--model", f"same={tmp_path / 'teacher'}", "--held-out", place,
        "--trained-on", place, "--out", str(tmp_path / "scores.json"),
    ])  # fmt: skip
    study.main()
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert rows["teacher"]["bits_per_byte"] < rows["control"]["bits_per_byte"]
    kept = [rows[name]["lead_kept"] for name in ("teacher", "control", "same")]
    assert kept == pytest.approx([1, 0, 1])
    assert rows["same"]["texts"] == rows["teacher"]["texts"]
    assert rows["people"]["copied_8_grams"] == 1
    assert rows["same"]["repeated_4_grams"] == rows["teacher"]["repeated_4_grams"]
