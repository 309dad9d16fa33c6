"""Every argument that transformers documents for `from_pretrained`: alike for own and published
checkpoints, by the class and by the Auto class; or refused by name."""

from __future__ import annotations

import json
import shutil

import crammed
import numpy as np
import pytest
import torch
from encoders import build as build_encoder
from model_files import write_published
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from nomatmul.models import CausalLM, CausalLMConfig, MaskedLM
from nomatmul.models import EncoderForSequenceClassification as Classifier

KINDS = ["own decoder", "published decoder", "own encoder", "published encoder"]
ALIKE = {
    "dtype": torch.bfloat16,
    "torch_dtype": "float16",
    "cache_dir": "cache",
    "force_download": True,
    "local_files_only": True,
    "token": "hf_none",
    "revision": "main",
    "use_safetensors": True,
    "weights_only": True,
    "low_cpu_mem_usage": True,
    "trust_remote_code": True,
    "attn_implementation": "sdpa",
    "device_map": "cpu",
    "ignore_mismatched_sizes": True,
    "offload_folder": "offload",
    "use_cache": True,
    "output_hidden_states": True,
    "initializer_range": 0.5,
    "id2label": {0: "a", 1: "b", 2: "c"},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A small checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    config = CausalLMConfig(vocab_size=48, hidden_size=32, num_layers=2, intermediate_size=40)
    torch.manual_seed(0)
    CausalLM(config).save_pretrained(folder / "own decoder")
    write_published(folder / "published decoder", np.random.default_rng(0))
    build_encoder(MaskedLM).save_pretrained(folder / "own encoder")
    values = crammed.config()
    crammed.write(folder / "published encoder", values, crammed.tensors(values))
    return folder


def loaders(kind: str):
    decoder = kind.endswith("decoder")
    return (CausalLM, AutoModelForCausalLM) if decoder else (MaskedLM, AutoModelForMaskedLM)


def same(a, b, dtype=None) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(v if dtype is None else v.to(dtype), right[k]) for k, v in left.items()
    )


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ALIKE)
def test_honoured_alike(directories, kind, auto, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cls, load = loaders(kind)[0], loaders(kind)[auto]
    plain = cls.from_pretrained(directories / kind)
    model = load.from_pretrained(directories / kind, **{word: ALIKE[word]})
    assert type(model) is cls
    assert not model.training
    dtype = {"dtype": torch.bfloat16, "torch_dtype": torch.float16}.get(word, torch.float32)
    assert model.dtype == dtype
    assert same(plain, model, dtype)
    if hasattr(plain.config, word) and not word.endswith("dtype"):
        assert getattr(model.config, word) == ALIKE[word]


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_information_configs_and_tensors(directories, kind, auto, tmp_path):
    cls, load = loaders(kind)[0], loaders(kind)[auto]
    place = directories / kind
    model, info = load.from_pretrained(place, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what]
    changed = type(model.config).from_dict({**model.config.to_dict(), "use_cache": False})
    by_config = load.from_pretrained(place, config=changed)
    assert by_config.config.use_cache is False
    assert same(model, by_config)
    assert same(model, cls.from_pretrained(place, config=str(place)))
    tensors = {name: value + 1 for name, value in model.state_dict().items()}
    given = cls.from_pretrained(None, config=model.config, state_dict=tensors)
    assert all(torch.equal(given.state_dict()[name], value) for name, value in tensors.items())
    with pytest.raises(ValueError, match="state_dict"):
        load.from_pretrained(place, state_dict=tensors)
    shutil.copytree(place, tmp_path / "outer" / "inner")
    inner = load.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert same(model, inner)


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_refused_by_name(directories, kind, auto):
    load = loaders(kind)[auto]
    with pytest.raises(TypeError, match="use_cachee"):
        load.from_pretrained(directories / kind, use_cachee=False)
    for word, value in {
        "variant": "fp16",
        "use_safetensors": False,
        "dtype": "int8",
        "attn_implementation": "flash_attention_2",
        "quantization_config": {"quant_method": "no such method"},
    }.items():
        named = {"variant": "fp16|variant", "use_safetensors": "use_safetensors|pytorch_model"}
        named |= {"quantization_config": "no such method|quantization"}
        named |= {"attn_implementation": "(?i)flash.attention"}
        with pytest.raises((ValueError, OSError, ImportError), match=named.get(word, word)):
            load.from_pretrained(directories / kind, **{word: value})
    if kind.startswith("published"):
        with pytest.raises(ValueError, match="key_mapping is not supported"):
            load.from_pretrained(directories / kind, key_mapping={"a": "b"})
        wrong = (MaskedLM if "decoder" in kind else CausalLM).config_class()
        with pytest.raises(ValueError, match="config must be"):
            loaders(kind)[0].from_pretrained(directories / kind, config=wrong)


@pytest.mark.parametrize("kind", ["own encoder", "published encoder"])
def test_labels_of_another_number(directories, kind, tmp_path):
    with pytest.warns(UserWarning, match="drawn at random"):
        model = Classifier.from_pretrained(directories / kind, num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier"):
        Classifier.from_pretrained(tmp_path, num_labels=5)
    model = Classifier.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 5)


def test_sizes_of_a_published_config_may_not_contradict_the_file(directories):
    place = directories / "published decoder"
    config = CausalLM.from_pretrained(place).config
    config.vocab_size = 50
    with pytest.raises(ValueError, match=r"mismatched tensor embedding.weight, head.weight"):
        CausalLM.from_pretrained(place, config=config)
    assert json.loads((place / "config.json").read_text())["vocab_size"] == 48
