"""Train the models of this folder, or record what llama.cpp computes from their exports.

    PYTHONPATH=src python tests/golden/exports/record.py train     ten minutes on one core
    PYTHONPATH=src python tests/golden/exports/record.py           needs llama-cpp-python

Training writes NAME, packed directories of decoders of 2 layers of width 256 that read the
repository's own pages (docs/*.md). Recording exports each as a GGUF file of the name's type and
writes logits.safetensors: NAME.ids of a text, NAME.logits [T, V] (float16) of its first T tokens;
in its metadata the text, NAME.sha256 of the file that llama.cpp read, and NAME.written, with which
it went on behind PROMPT (texts as JSON).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[2] / "docs"
PROMPT, POSITIONS = "The model reads a text and writes", 160
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 2, "intermediate_size": 512, "num_heads": 4,
    "num_kv_heads": 2, "token_mixer": "attention", "linear": "ternary", "linear_norm": "none",
    "rounding": "even", "head_linear": "dense", "max_position_embeddings": 256,
}  # fmt: skip
# Name -> (what is its own, type of its GGUF file).
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama-tensor": ({"split_gate": True, "tie_embeddings": True}, "tq2_0"),
    "llama-256": ({"scale_group": 256, "rope_theta": 500000.0}, "tq2_0"),
    "qwen3-128": ({"scale_group": 128, "qk_norm": True, "tie_embeddings": True}, "q2_0"),
}


def train(name: str, text: Path, work: Path) -> None:
    from nomatmul.convert import pack
    from nomatmul.formats.config import ModelConfig
    from nomatmul.train import TrainConfig, run
    from nomatmul.train.documents import find_sources
    from nomatmul.train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(find_sources([str(text)]), 320)
    tokenizer.save(str(work / "tokenizer.json"))
    model = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **SIZES, **MODELS[name][0])
    config = TrainConfig(
        recipe="exports", model=model, sequence_length=96, batch_size=8, micro_batch_size=8,
        steps=500, learning_rate=3e-3, warmup_steps=30, valid_fraction=0.02,
        log_interval=50, eval_interval=0, sample_interval=0, diagnostics_interval=0,
        checkpoint_interval=500, checkpoint_seconds=0.0,
    )  # fmt: skip
    out, tokens = work / name, {"tokenizer": str(work / "tokenizer.json")}
    print(run(config, [str(text)], out, workers=1, device="cpu", **tokens))
    shutil.rmtree(HERE / name, ignore_errors=True)
    pack(out, HERE / name, embedding="bf16", check=False)


def record(name: str, text: str, work: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from llama_cpp import Llama

    from nomatmul.convert.export import export

    path = work / f"{name}.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # int8 activations a token
        export(HERE / name, path, type=MODELS[name][1])
    options = {"n_ctx": 256, "logits_all": True, "verbose": False, "n_threads": 1}
    model = Llama(str(path), type_k=0, type_v=0, **options)  # float32 keys and values
    ids = model.tokenize(text.encode(), add_bos=True, special=False)
    model.eval(ids[:POSITIONS])
    logits = np.array(model.scores[:POSITIONS], np.float16)
    written = model(PROMPT, max_tokens=40, temperature=0.0)["choices"][0]["text"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(name, path.stat().st_size, digest[:8], repr(written))
    return {f"{name}.ids": np.array(ids), f"{name}.logits": logits}, {
        f"{name}.sha256": digest,
        f"{name}.written": json.dumps(written),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if sys.argv[1:] == ["train"]:
            text = work / "docs.txt"
            text.write_text("\n".join(p.read_text("utf-8") for p in sorted(DOCS.glob("*.md"))))
            for name in MODELS:
                train(name, text, work)
            return
        text = (DOCS / "numerics.md").read_text("utf-8")[:1500]
        tensors, metadata = {}, {"text": json.dumps(text)}
        for name in MODELS:
            found, words = record(name, text, work)
            tensors |= found
            metadata |= words
        save_file(tensors, HERE / "logits.safetensors", metadata)


if __name__ == "__main__":
    main()
