"""Saving, loading, transformers' Auto classes, and what must be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nomatmul.engine.loading import BOX
from nomatmul.models import CausalLM, CausalLMConfig


def same(a: CausalLM, b: CausalLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_save_and_load_give_the_same_model(build, ids, tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert same(model, again)
    assert again.config.model_config == model.config.model_config
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not again.training
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(auto) is CausalLM
    assert auto.dtype == torch.bfloat16
    assert auto(ids).logits.dtype == torch.bfloat16


def test_large_models_are_sharded(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(model, CausalLM.from_pretrained(tmp_path))


def test_training_directory_is_what_formats_reads(build, tmp_path):
    from nomatmul.formats.checkpoint import open_checkpoint

    for name in ("matmul-free", "transformer++"):
        model = build(name)
        model.save_pretrained(tmp_path / name)
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.config == model.config.model_config
        for tensor, value in model.named_parameters():
            assert torch.equal(torch.from_numpy(checkpoint.read(tensor)), value), tensor


def test_published_directory_by_auto_class(tiny, tmp_path, ids):
    auto = AutoModelForCausalLM.from_pretrained(tiny)
    assert type(auto) is CausalLM
    assert isinstance(AutoConfig.from_pretrained(tiny), CausalLMConfig)
    assert same(auto, CausalLM.from_pretrained(tiny))
    half = CausalLM.from_pretrained(tiny, dtype="float16")
    assert half.dtype == torch.float16
    assert torch.isfinite(half(ids).logits).all()
    auto.save_pretrained(tmp_path)
    assert same(auto, CausalLM.from_pretrained(tmp_path))


def test_tokenizer_travels_with_the_weights(build, tmp_path):
    from tokenizers import Tokenizer, models

    model = build()
    assert model.tokenizer is None
    model.tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model.save_pretrained(tmp_path)
    assert CausalLM.from_pretrained(tmp_path).tokenizer.token_to_id("b") == 1


def test_nan_weights_are_refused(build, tiny, tmp_path):
    model = build()
    with torch.no_grad():
        model.layers[1].channel.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"layers.1.channel.down_proj.weight holds NaN"):
        CausalLM.from_pretrained(tmp_path / "own")
    shutil.copytree(tiny, tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    file.chmod(0o644)
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm.weight"):
        CausalLM.from_pretrained(tmp_path / "published")


def _with_tensors(build, path, change) -> None:
    build().save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_unknown_and_misshapen_tensors_are_refused(build, tmp_path):
    def add(tensors):
        tensors["layers.0.extra"] = torch.zeros(2)

    _with_tensors(build, tmp_path / "a", lambda t: t.pop("final_norm.weight"))
    with pytest.raises(ValueError, match=r"missing tensor final_norm.weight"):
        CausalLM.from_pretrained(tmp_path / "a")
    _with_tensors(build, tmp_path / "b", add)
    with pytest.raises(ValueError, match=r"unexpected tensor layers.0.extra"):
        CausalLM.from_pretrained(tmp_path / "b")
    _with_tensors(build, tmp_path / "c", lambda t: t.update({"head.weight": torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match="cannot load"):
        CausalLM.from_pretrained(tmp_path / "c")


def test_damaged_and_foreign_directories_are_refused(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        CausalLM.from_pretrained(tmp_path / "cut")

    with pytest.raises(ValueError, match="the engine loads it"):
        CausalLM.from_pretrained(BOX)

    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_text(json.dumps({"format": "nomatmul-packed"}))
    with pytest.raises(ValueError, match="format_version None is unknown"):
        CausalLM.from_pretrained(packed)
    (packed / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        CausalLM.from_pretrained(packed)
    (packed / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="llama"):
        CausalLM.from_pretrained(packed)
    (packed / "config.json").unlink()
    with pytest.raises(ValueError, match="nowhere does not exist"):
        CausalLM.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no config.json"):
        CausalLM.from_pretrained(packed)


def test_half_precision_files_compute_in_float32_unless_asked(tiny, tmp_path):
    half = CausalLM.from_pretrained(tiny, dtype="float16")
    half.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    for load in (CausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(tmp_path)
        assert model.dtype == torch.float32
        torch.testing.assert_close(model(ids).logits, half.float()(ids).logits, rtol=0, atol=0)
    assert CausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_a_non_float_dtype_is_refused(tiny):
    with pytest.raises(ValueError, match="dtype"):
        CausalLM.from_pretrained(tiny, dtype="int8")


_HOOK = """
import sys, nomatmul
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import AutoConfig
assert AutoConfig.for_model("nomatmul").num_layers == 24
assert "nomatmul.models" in sys.modules
print("registered")
"""


def test_importing_nomatmul_registers_lazily():
    done = subprocess.run(
        [sys.executable, "-c", _HOOK], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "registered", done.stderr[-2000:]
