"""What cannot be made ternary is refused by name, before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from nomatmul.formats.config import ModelConfig
from nomatmul.train.ternarise import open_teacher, student_of

SHAPE = ModelConfig(
    vocab_size=64, hidden_size=192, num_layers=1, intermediate_size=384, num_heads=6,
    token_mixer="attention", linear="dense",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(at)
    letters = {f"t{number}": number for number in range(61)}
    Tokenizer(WordLevel(letters, unk_token="t0")).save(str(at / "tokenizer.json"))
    return at


def changed(llama: Path, at: Path, **values: object) -> Path:
    at.mkdir()
    config = json.loads((llama / "config.json").read_text()) | values
    (at / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (at / name).symlink_to(llama / name)
    return at


def test_a_plain_llama_is_taken(llama: Path) -> None:
    student = student_of(open_teacher(str(llama)).config, 32)
    assert (student.linear, student.linear_norm, student.scale_group) == ("ternary", "none", 32)
    assert (student.head_kind, student.embedding_linear) == ("dense", "dense")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": "qwen2"}, "biases of q, k and v"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16"),
        ({"model_type": "qwen3_moe"}, "experts"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is unknown"),
        ({"model_type": "qwen3", "head_dim": 16, "layer_types": ["sliding_attention"]},
         "layer_types holds 'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_named(
    llama: Path, tmp_path: Path, values: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        open_teacher(str(changed(llama, tmp_path / "model", **values)))


def test_a_tensor_without_a_place_is_named(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    at = changed(llama, tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(llama / "model.safetensors") | {name: torch.zeros(32)}
    (at / "model.safetensors").unlink()
    save_file(tensors, at / "model.safetensors")
    with pytest.raises(ValueError, match=f"unknown tensor '{name}'"):
        open_teacher(str(at))


def test_files_that_are_no_such_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Hub is hf:owner/model"):
        open_teacher("owner/model")
    at = changed(llama, tmp_path / "bare")
    (at / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        open_teacher(str(at))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a GGUF file"):
        open_teacher(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"token_mixer": "mlgru"}, "token_mixer 'mlgru', not 'attention'"),
        ({"channel_mixer": "ffn"}, "channel_mixer 'ffn', not 'glu'"),
        ({"causal": False}, "causal False, not True"),
        ({"norm": "layer"}, "norm 'layer', not 'rms'"),
        ({"positions": "none"}, "positions 'none', not 'rotary'"),
        ({"embedding_norm": True}, "embedding_norm True, not False"),
        ({"linear": "ternary"}, "ternary already"),
    ],
)
def test_other_shapes_are_named(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        student_of(dataclasses.replace(SHAPE, **changes))  # type: ignore[arg-type]


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="128 does not divide the model's widths 192, 384: choose"):
        student_of(SHAPE, 128)
    with pytest.raises(ValueError, match="scale-group 48 is unknown: choose 0, 32, 64, 128, 256"):
        student_of(SHAPE, 48)
    assert student_of(SHAPE, 64).scale_group == 64
    assert student_of(SHAPE, 0).split_gate
