"""Exports as others read them: llama.cpp, recorded, and transformers' own classes.

The models are trained (tests/golden/exports/record.py): the likeliest token means something.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import nomatmul
from nomatmul.convert.agreement import relative_error, same_argmax
from nomatmul.convert.export import export

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "exports"
TYPES = {"llama-tensor": "tq2_0", "llama-256": "tq2_0", "qwen3-128": "q2_0"}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PROMPT = "The model reads a text and writes"

pytestmark = pytest.mark.filterwarnings("ignore:.*int8 activations")


@pytest.fixture(scope="module")
def recorded():
    with safe_open(RECORDED / "logits.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_computes_what_the_engine_does(tmp_path, recorded, name):
    """On the very file that is written now: its SHA-256 was recorded beside llama.cpp's logits."""
    tensors, words = recorded
    path = tmp_path / f"{name}.gguf"
    export(RECORDED / name, path, type=TYPES[name])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == words[f"{name}.sha256"], "another file than llama.cpp read: record it again"
    wanted = tensors[f"{name}.logits"].astype(np.float32)
    assert len(wanted) == 160
    found = nomatmul.load(RECORDED / name).logits(tensors[f"{name}.ids"][:160])
    assert len(set(wanted.argmax(1).tolist())) > 30  # what is likeliest is not always the same
    assert same_argmax(found, wanted) >= 0.97
    assert relative_error(found, wanted) < 0.005


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_cuts_texts_as_the_engine_does(recorded, name):
    """And writes the same, as long as no two tokens are equally likely."""
    tensors, words = recorded
    model = nomatmul.load(RECORDED / name)
    ids = model.tokenizer.encode(json.loads(words["text"]), add_special_tokens=False).ids
    assert [0, *ids] == tensors[f"{name}.ids"].tolist()
    written = json.loads(words[f"{name}.written"])
    assert model.generate(PROMPT, max_tokens=40, temperature=0.0)[:24] == written[:24]


@pytest.mark.train
@pytest.mark.parametrize("name", TYPES)
def test_transformers_computes_what_torch_does_with_floats(tmp_path, recorded, name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nomatmul.models import CausalLM

    result = export(RECORDED / name, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == CLASSES[result.family]
    ours = CausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tensors, _ = recorded
    ids = torch.tensor(tensors[f"{name}.ids"][:160])[None]
    with torch.inference_mode():
        wanted, found = ours(ids).logits[0].numpy(), theirs.float()(ids).logits[0].numpy()
    assert relative_error(found, wanted) < 1e-5
    engine = nomatmul.load(RECORDED / name).logits(ids[0].numpy())  # the figures of exporting.md
    assert relative_error(found, engine) < 0.006
    assert same_argmax(found, engine) >= 0.98
    recorded_logits = tensors[f"{name}.logits"].astype(np.float32)
    assert same_argmax(found, recorded_logits) >= 0.97
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = nomatmul.load(RECORDED / name)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert prompt[0, 0] == tokenizer.bos_token_id == 0
    written = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(written) == model.generate(PROMPT, max_tokens=12, temperature=0.0)
