"""The start of a ternary model is the pretrained one: equal logits until weights are rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nomatmul
from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.models import CausalLM, CausalLMConfig
from nomatmul.models.layers import TernaryLinear
from nomatmul.ops.bitlinear import dequantize
from nomatmul.train.ternarise import student_of
from nomatmul.train.ternary_values import write_values

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
TEACHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
    "qwen3 tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)
    ),
}


@pytest.fixture(params=TEACHERS)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model as transformers writes it; its norms are not all ones."""
    torch.manual_seed(3)
    model = TEACHERS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return tmp_path


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(2))


def student(teacher: Path, group: int, **changes: str) -> CausalLM:
    """The ternary model with the teacher's weights, or with `changes` of its dials."""
    config = student_of(open_checkpoint(teacher).config, group)
    plain = dataclasses.replace(config, **changes) if changes else config
    model = CausalLM(CausalLMConfig.from_model_config(plain))
    model.load_state_dict(CausalLM.from_pretrained(teacher).state_dict())  # strict: all names
    return model.eval()


@torch.no_grad()
def test_without_rounding_it_is_the_pretrained_model(teacher: Path) -> None:
    dense = {"linear": "dense", "linear_norm": "all", "rounding": "away", "head_linear": None}
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    model = student(teacher, 32)
    floats = CausalLM(
        CausalLMConfig.from_model_config(
            dataclasses.replace(model.model_config, scale_group=0, **dense)
        )
    ).eval()
    floats.load_state_dict(model.state_dict())
    expected = theirs(ids()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(floats(ids()).logits, expected, atol=1e-4, rtol=1e-4)
    assert (model(ids()).logits - expected).abs().max() > 0.1  # rounding changes it


@torch.no_grad()
def test_with_rounding_it_is_the_ternary_model(teacher: Path) -> None:
    """transformers' own class computes the same when its weights are t * scale."""
    model = student(teacher, 32)
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    for own, layer in zip(model.layers, theirs.model.layers, strict=True):
        rounded = {
            name: dequantize(*linear.quantised())
            for name, linear in own.named_modules()
            if isinstance(linear, TernaryLinear)
        }
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, part).weight.copy_(rounded[f"mixer.{part}"])
        gate, up = rounded["channel.gate_proj"].chunk(2)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(rounded["channel.down_proj"])
    expected = theirs(ids()).logits
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("group", [32, 0])
def test_values_are_the_models_and_scales_are_float16(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory, group: int
) -> None:
    at = tmp_path_factory.mktemp("model")
    latent = student(teacher, group)
    latent.save_pretrained(at)
    (at / "training.json").write_text('{"step": 1}')
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    letters = {f"t{number}": number for number in range(61)}
    Tokenizer(WordLevel(letters, unk_token="t0")).save(str(at / "tokenizer.json"))
    tokens = dataclasses.replace(latent.model_config, bos_token_id=3, eos_token_id=(4, 5))
    write_values(at, teacher, tokens)
    stored = CausalLM.from_pretrained(at).eval()
    assert stored.config.stored_linears
    assert (stored.config.bos_token_id, stored.model_config.end_token_ids) == (3, (4, 5))
    assert (at / "chat_template.jinja").read_text() == "{{ messages }}"
    kept = {name: layer for name, layer in stored.named_modules() if hasattr(layer, "values")}
    assert len(kept) == 2 * 6
    for name, layer in kept.items():
        values, scale = latent.get_submodule(name).quantised()
        assert torch.equal(layer.values.float(), values)
        assert torch.equal(layer.scale, layer.scale.half().float())
        torch.testing.assert_close(layer.scale, scale, rtol=2**-11, atol=0)
    for table in (stored.embedding.weight, stored.head.weight):
        assert torch.equal(table, table.half().float())
    assert (stored.head.weight is stored.embedding.weight) == tokens.tie_embeddings
    expected = latent(ids()).logits
    bound = 0.02 if group else 0.06  # a rounded embedding turns roundings of int8 activations
    assert (stored(ids()).logits - expected).std() < bound * expected.std()
    packed = at / "packed"
    assert pack(at, packed, check=False).embedding == "f16"  # and loses nothing
    ours = nomatmul.load(packed, kv="f32").logits(ids()[0].tolist())
    bound = 0.05 if group else 0.002  # activations of groups are rounded by the engine alone
    assert (ours - stored(ids()).logits[0].numpy()).std() < bound * float(expected.std())
    before = (at / "model.safetensors").read_bytes()
    write_values(at, teacher, tokens)  # once written it stays
    assert (at / "model.safetensors").read_bytes() == before
