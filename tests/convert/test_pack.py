"""Packing: the right bytes, from every kind of source, in little memory, and checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_files import encoder_config, write_encoder
from model_files import packed_values, write_published, write_tokenizer, write_training

import nomatmul
from nomatmul.convert import check, pack
from nomatmul.convert.source import find_checkpoint
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.quantise import from_bfloat16, to_bfloat16

CONFIG = ModelConfig(vocab_size=50, hidden_size=36, num_layers=3, intermediate_size=44)


WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path, rng) -> Path:
    write_training(tmp_path / "source", CONFIG, rng)
    return tmp_path / "source"


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
@pytest.mark.parametrize("embedding", ["f32", "bf16", "int8"])
def test_every_tensor_is_what_the_formats_say(source, tmp_path, packing, embedding):
    pack(source, tmp_path / "packed", packing=packing, embedding=embedding, check=False)
    reader = PackedReader(tmp_path / "packed")
    checkpoint = open_checkpoint(source)
    assert reader.config == CONFIG
    expected = packed_values(checkpoint, packing, embedding if embedding == "int8" else "bf16")
    if embedding == "f32":
        expected["embedding.weight"] = checkpoint.read("embedding.weight")
    for name, value in expected.items():
        found = reader.read(name) if not name.endswith(".packed") else None
        if found is None:
            found, _ = reader.ternary(name.removesuffix(".packed"))
        assert np.array_equal(found, value), name
    assert len(expected) == len(reader.infos)


def test_auto_keeps_bfloat16_values_as_such_and_others_exactly(source, tmp_path, rng):
    assert pack(source, tmp_path / "exact", check=False).embedding == "f32"
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    table = tensors["embedding.weight"]
    tensors["embedding.weight"] = from_bfloat16(to_bfloat16(table))
    save_file(tensors, source / "model.safetensors")
    assert pack(source, tmp_path / "short", check=False).embedding == "bf16"


def test_auto_of_an_encoder_looks_at_its_classifier_too(tmp_path):
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "source"
    write_encoder(source, encoder_config(channel_mixer="ffn"), "token", ("no", "yes"))
    tensors = load_file(source / "model.safetensors")
    short = {name: from_bfloat16(to_bfloat16(values)) for name, values in tensors.items()}
    save_file({**short, "classifier.weight": tensors["classifier.weight"]}, source / WEIGHTS)
    assert pack(source, tmp_path / "exact", check=False).dense == "f32"
    save_file(short, source / WEIGHTS)
    assert pack(source, tmp_path / "short", check=False).dense == "bf16"


def test_the_check_agrees_on_a_sound_model(source, tmp_path):
    write_tokenizer(source)
    result = pack(source, tmp_path / "packed")
    assert result.tokenizer == "copied"
    assert result.check is not None
    assert result.check.relative_error < 2e-2
    assert result.check.same_argmax >= 0.98
    assert result.check.packed_loss == pytest.approx(result.check.source_loss, abs=0.01)
    assert result.packed_bytes < result.source_bytes


def test_the_check_without_torch_uses_the_oracle(source, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_torch_fits", lambda checkpoint: False)
    result = pack(source, tmp_path / "packed")
    assert result.check is not None
    assert result.check.source_backend == "numpy oracle"
    assert result.check.text == "random token ids"
    assert result.check.relative_error < 2e-2


def test_the_check_tells_a_wrong_model(source, tmp_path, rng):
    other = tmp_path / "other"
    write_training(other, CONFIG, rng)
    pack(other, tmp_path / "packed", check=False)
    found = check.check_packed(open_checkpoint(source), tmp_path / "packed", check.CheckText())
    assert found.relative_error > 0.5
    assert found.largest_difference > 0.1


def test_a_published_model_agrees_with_its_recorded_logits(tiny, golden, tmp_path):
    assert pack(tiny, tmp_path / "packed", check=False).tokenizer == "none"
    lm = nomatmul.load(tmp_path / "packed")
    mask = golden["attention_mask"].astype(bool)
    ids = golden["input_ids"]
    found = np.concatenate([lm.logits(row[keep]) for row, keep in zip(ids, mask, strict=True)])
    wanted = golden["logits"][mask]
    error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert error < 2e-2
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.98


def test_a_published_directory_with_sentencepiece(tmp_path, rng, sentencepiece_file):
    source = tmp_path / "published"
    write_published(source, rng, vocab_size=32000)
    shutil.copy(sentencepiece_file, source)
    assert pack(source, tmp_path / "packed").tokenizer == "converted"
    text = nomatmul.load(tmp_path / "packed").generate("Hello world", max_tokens=3)
    assert isinstance(text, str)


@pytest.mark.parametrize("token_mixer", ["attention", "mlgru"])
def test_other_ternary_models_are_packed_too(tmp_path, rng, token_mixer):
    config = ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, token_mixer=token_mixer,
        channel_mixer="ffn", intermediate_size=48, tie_embeddings=True, use_lower_bound=False,
    )  # fmt: skip
    write_training(tmp_path / "source", config, rng)
    result = pack(tmp_path / "source", tmp_path / "packed")
    assert result.check is not None
    assert result.check.packed_backend == "numpy oracle"
    assert result.check.relative_error < 2e-2


def test_the_checkpoint_of_a_run_is_found(tmp_path, rng):
    run = tmp_path / "run"
    steps = [run / "checkpoints" / f"step-{step:08d}" for step in (5, 20, 100)]
    for step in steps:
        write_training(step, CONFIG, rng)
    assert find_checkpoint(run) == steps[2]
    (run / "checkpoints" / "latest").write_text(steps[1].name)
    assert find_checkpoint(run) == steps[1]
    write_training(run / "model", CONFIG, rng)
    assert find_checkpoint(run) == run / "model"
    assert find_checkpoint(run / "model") == run / "model"


def test_the_card_names_the_model(source, tmp_path):
    pack(source, tmp_path / "packed", check=False)
    card = (tmp_path / "packed" / "README.md").read_text()
    for words in ("| layers | 3 |", "two bits a weight", "float32", "must not be quantised again"):
        assert words in card


def test_packing_needs_little_memory(tmp_path):
    """A model of 49 MB, its largest tensor 16.8 MB, packs within a few blocks of rows."""
    from safetensors.numpy import save_file

    from nomatmul.formats.architecture import architecture_of

    config = ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=1, intermediate_size=2048, num_heads=1
    )
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    shapes = architecture_of(config).tensors()
    tensors = {n: rng.random(shape, dtype=np.float32) for n, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "nomatmul", **config.to_dict()}))
    code = (
        "import json, sys\n"
        "from nomatmul.engine.report import memory_of_process\n"
        "from nomatmul.convert import pack\n"
        "import nomatmul.formats.files.safetensors, numpy.random\n"
        "before = memory_of_process()[1]\n"
        f"pack({str(source)!r}, {str(tmp_path / 'packed')!r}, check=False)\n"
        "print(memory_of_process()[1] - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    largest = max(tensor.nbytes for tensor in tensors.values())
    output = sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())
    assert int(done.stdout) < 2 * largest + output
