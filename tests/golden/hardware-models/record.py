"""Train and pack the two models of this folder (README.md beside this file).

    PYTHONPATH=src python tests/golden/hardware-models/record.py

Takes about three minutes on one core. The text is docs/*.md of the repository.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nomatmul.convert import pack
from nomatmul.formats.config import ModelConfig
from nomatmul.train import TrainConfig, run
from nomatmul.train.documents import find_sources
from nomatmul.train.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent.parent / "docs"
SIZES: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "glu": {"intermediate_size": 96},
    "trees": {"channel_mixer": "fff", "activation": "silu", "fff_trees": 4, "fff_depth": 3},
}


def record(name: str, text: Path, work: Path) -> None:
    tokenizer = train_tokenizer(find_sources([str(text)]), 384)
    tokenizer.save(str(work / "tokenizer.json"))
    model = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES, **MODELS[name])
    config = TrainConfig(
        recipe="hardware-tiny", model=model, sequence_length=128, batch_size=16,
        micro_batch_size=16, steps=600, learning_rate=1e-2, schedule="cosine_halved",
        warmup_steps=30, valid_fraction=0.02,
        log_interval=50, eval_interval=0, sample_interval=0, diagnostics_interval=0,
        checkpoint_interval=600, checkpoint_seconds=0.0,
    )  # fmt: skip
    out = work / name
    tokens = {"tokenizer": str(work / "tokenizer.json")}
    print(run(config, [str(text)], out, workers=1, device="cpu", **tokens))
    shutil.rmtree(HERE / name, ignore_errors=True)
    pack(out, HERE / name, embedding="int8", check=False)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = work / "docs.txt"
        text.write_text("\n".join(p.read_text("utf-8") for p in sorted(DOCS.glob("*.md"))), "utf-8")
        for name in MODELS:
            record(name, text, work)


if __name__ == "__main__":
    main()
