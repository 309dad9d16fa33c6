"""Checkpoints saved from inside wrappers: read alike by torch, the numpy path and the packer."""

from __future__ import annotations

import json
import warnings

import crammed
import numpy as np
import pytest
import torch
from encoders import build as build_encoder
from model_files import write_published
from safetensors.torch import load_file, save_file

from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.models import CausalLM, CausalLMConfig, MaskedLM

KINDS = ["own decoder", "published decoder", "own encoder", "published encoder"]
PREFIXES = [
    "_orig_mod.",
    "module.",
    "module._orig_mod.",
    "_forward_module.model.",
    "model.",
    "net.",
]


def write(kind: str, folder) -> dict[str, torch.Tensor]:
    """A checkpoint without its weights' file; returns the tensors as stored."""
    if kind == "own decoder":
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "hidden_size": 32, "num_layers": 2, "intermediate_size": 40}
        CausalLM(CausalLMConfig(**sizes)).save_pretrained(folder)
    elif kind == "published decoder":
        write_published(folder, np.random.default_rng(0))
    elif kind == "own encoder":
        build_encoder(MaskedLM).save_pretrained(folder)
    else:
        values = crammed.config()
        crammed.write(folder, values, crammed.tensors(values))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "plain.safetensors")
    return tensors


def check(kind: str, folder, tensors, said: str, *, packs: bool = True) -> None:
    """The directory gives the model of `tensors`, in torch and numpy, and says what it undid."""
    cls = CausalLM if kind.endswith("decoder") else MaskedLM
    with pytest.warns(UserWarning, match=said):
        model = cls.from_pretrained(folder)
    with pytest.warns(UserWarning, match=said):
        checkpoint = open_checkpoint(folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    if packs:
        with pytest.warns(UserWarning, match=said):
            pack(folder, folder / "packed", check=False)
    for file in (*folder.glob("pytorch_model*"), *folder.glob("model*.safetensors")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = cls.from_pretrained(folder)
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, value in plain.named_parameters():
        assert torch.equal(model.state_dict()[name], value), name
        assert np.array_equal(weights[name], value.detach().numpy()), name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_that_all_tensors_share(tmp_path, kind, prefix):
    tensors = write(kind, tmp_path)
    wrapped = {prefix + name: value for name, value in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check(kind, tmp_path, tensors, rf"took the wrapper's prefix .*{prefix.rpartition('.')[0][-5:]}")


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_inside_names(tmp_path, kind):
    tensors = write(kind, tmp_path)
    wrapped = {
        name.replace("layers.0.", "layers.0._fsdp_wrapped_module._orig_mod."): value
        for name, value in tensors.items()
    }
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    check(kind, tmp_path, tensors, "'_orig_mod.', '_fsdp_wrapped_module.'", packs=False)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_level_of_nesting(tmp_path, kind, key):
    tensors = write(kind, tmp_path)
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    state = {key: wrapped, "optimizer": {"lr": 0.1}, "epoch": 3}
    torch.save(state, tmp_path / "pytorch_model.bin")
    check(kind, tmp_path, tensors, f"nested under '{key}'", packs=False)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_are_no_floats_are_left_out(tmp_path, kind, pickled):
    tensors = write(kind, tmp_path)
    cls = CausalLM if kind.endswith("decoder") else MaskedLM
    more = {**tensors, "layers.0.ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool)}
    if pickled:
        torch.save(more, tmp_path / "pytorch_model.bin")
    else:
        save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, weights = cls.from_pretrained(tmp_path), open_checkpoint(tmp_path)
    for name, value in model.named_parameters():
        assert np.array_equal(weights.read(name), value.detach().numpy()), name


def test_what_is_no_wrapper_is_named(tmp_path):
    tensors = write("published decoder", tmp_path)
    odd = {("module." if "layers" in n else "") + n: v for n, v in tensors.items()}
    torch.save(odd, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'module\.model\.layers.*not all tensors share"):
        open_checkpoint(tmp_path)
    twice = {**tensors, "model._orig_mod.norm.weight": tensors["model.norm.weight"]}
    torch.save(twice, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are one tensor without wrappers"):
        open_checkpoint(tmp_path)
    torch.save({"weights": tensors, "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'weights' is a nested dict"):
        open_checkpoint(tmp_path)
    whole = {n: (v * 9).to(torch.int8) if "i_proj" in n else v for n, v in tensors.items()}
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has dtype torch.int8, expected a float"):
        CausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hgrn_bit"
