"""Published transformers in torch: padding, caches and texts are those of transformers' classes.

tests/parity/test_published_torch.py compares the logits of every form that they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import write_gguf
from safetensors.torch import load_file
from support import published_lm as lm
from torch import Tensor
from transformers import AutoModelForCausalLM

from nomatmul.formats.published.gguf import open_gguf
from nomatmul.models import BitLinear, CausalLM, DenseLinear, StoredLinear
from nomatmul.models.hf.cache import cache_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, Callable[[Path, np.random.Generator], Path]] = {
    "bitnet": lambda at, rng: lm.write_packed(at, lm.random_model(lm.BITNET, rng), legacy=False),
    "llama": lambda at, rng: lm.write_packed(at, lm.random_model(lm.LLAMA, rng), legacy=True),
    "qwen3": lambda at, rng: lm.write_values(
        at, lm.random_model(lm.QWEN3, rng, group=32, ternary_head=True)
    ),
    "yarn": lambda at, rng: lm.write_values(
        at, lm.random_model({**lm.LLAMA, "rope_scaling": YARN, "head_dim": 16}, rng)
    ),
}
INT8 = ("bitnet", "llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[CausalLM, Any]]:
    """models(name) -> (ours, transformers')."""
    made: dict[str, tuple[CausalLM, Any]] = {}

    def get(name: str) -> tuple[CausalLM, Any]:
        if name not in made:
            at = MODELS[name](tmp_path_factory.mktemp(name), np.random.default_rng(5))
            theirs = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
            for module in theirs.modules():
                if type(module).__name__ == "BitLinear":  # the legacy one keeps a type of its own
                    module.dtype = torch.float32
            made[name] = CausalLM.from_pretrained(at).eval(), theirs
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _plain_bit_linear() -> Iterator[None]:
    """transformers compiles the quantisers of its legacy BitLinear: not here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def prompts() -> tuple[Tensor, Tensor]:
    """Ids [2, 40] and a mask: the second row begins with padding."""
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids, mask


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_and_caches_are_those_of_transformers(models, name):
    ours, theirs = models(name)
    ids, mask = prompts()
    first = ours(ids[:, :25], attention_mask=mask[:, :25], use_cache=True)
    rest = ours(ids[:, 25:], attention_mask=mask, cache=cache_of(first))
    real = mask.bool()
    expected = theirs(ids, attention_mask=mask).logits[real]
    whole = ours(ids, attention_mask=mask).logits[real]
    for found in (whole, torch.cat([first.logits, rest.logits], 1)[real]):
        assert (found - expected).norm() / expected.norm() < (3e-2 if name in INT8 else 1e-5)
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.97


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_texts_part_at_a_near_tie_only(models, name):
    ours, theirs = models(name)
    ids, mask = prompts()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = ours.generate(ids, attention_mask=mask, **options)
    expected = theirs.generate(ids, attention_mask=mask, **options)
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        if torch.equal(a, b):
            continue
        at = int((a != b).nonzero()[0])
        longer = torch.cat([mask[row], mask.new_ones(at - mask.shape[1])])[None]
        best = [model(b[None, :at], attention_mask=longer).logits[0, -1] for model in models(name)]
        error = (best[0] - best[1]).abs().max()
        first, second = best[1].topk(2).values
        assert first - second < 2 * error + 1e-5


@pytest.mark.parametrize("name", INT8)
def test_ternary_values_are_kept_as_they_are(models, name):
    ours, _ = models(name)
    values = lm.BITNET if name == "bitnet" else lm.LLAMA
    model = lm.random_model(values, np.random.default_rng(5))
    t, scale = model.ternary["model.layers.1.self_attn.o_proj"]
    layer = ours.layers[1].mixer.o_proj
    assert isinstance(layer, StoredLinear)
    np.testing.assert_array_equal(layer.values.numpy(), t)
    np.testing.assert_allclose(layer.scale.numpy(), scale[0], rtol=1e-7)
    assert (layer.norm is not None) == (name == "bitnet")
    gates = [model.ternary[f"model.layers.0.mlp.{part}_proj"][0] for part in ("gate", "up")]
    np.testing.assert_array_equal(ours.layers[0].channel.gate_proj.values, np.concatenate(gates))
    assert isinstance(ours.head, DenseLinear)
    assert not any(isinstance(module, BitLinear) for module in ours.modules())


@pytest.mark.parametrize("masters", [True, False])
def test_a_checkpoint_is_loaded_to_be_trained_on(tmp_path, rng, masters):
    """Masters are what training goes on from; values get the weights that to_latents makes."""
    model = lm.random_model(lm.BITNET, rng)
    if masters:
        lm.write_masters(tmp_path, model, rng)
    else:
        lm.write_packed(tmp_path, model, legacy=False)
    ours = CausalLM.from_pretrained(tmp_path, latents=True)
    assert not ours.config.stored_linears
    stored = CausalLM.from_pretrained(tmp_path)
    ids, _ = prompts()
    error = (ours(ids).logits - stored(ids).logits).norm() / stored(ids).logits.norm()
    assert error < 2e-2
    expected = {}
    if masters:
        file = load_file(tmp_path / "model.safetensors")
        parts = [file[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        expected = {"layers.1.channel.gate_proj.weight": torch.cat(parts)}
    else:
        stored.to_latents()
        expected = stored.state_dict()
        assert expected.keys() == ours.state_dict().keys()
    for name, weight in expected.items():
        assert torch.equal(ours.state_dict()[name], weight)
    ours.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())
    stored = CausalLM.from_pretrained(tmp_path)
    stored.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved", latents=True)
    assert not again.config.stored_linears


@pytest.mark.parametrize(("kind", "outer"), [("TQ2_0", "Q8_0"), ("Q8_0", "F32")])
@torch.no_grad()
def test_a_gguf_file_is_the_model_that_its_tensors_say(tmp_path, rng, kind, outer):
    """The same tensors by their Hugging Face names in a directory give the same logits."""
    file = tmp_path / "gguf" / "x.gguf"
    file.parent.mkdir()
    group = 256 if kind == "TQ2_0" else 32
    tensors = write_gguf(file, "llama", rng, kind=kind, outer=outer, group=group)
    config, _ = open_gguf(file)
    lm.write(tmp_path / "plain", config, tensors)
    ids = torch.from_numpy(rng.integers(3, 40, (1, 20)))
    expected = CausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    for path in (file, str(file), file.parent):
        model = CausalLM.from_pretrained(path)
        assert torch.equal(model(ids).logits, expected)
    assert isinstance(model.layers[0].mixer.q_proj, StoredLinear)
    assert isinstance(model.head, DenseLinear)


@torch.no_grad()
def test_a_text_is_embedded_by_its_last_token(models):
    ours, theirs = models("qwen3")
    ids, mask = prompts()
    left = ours.embed(ids, mask)
    hidden = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, -1]
    expected = hidden / hidden.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5)
    text = ids[1, 9:]
    right = torch.stack([ids[0], torch.cat([text, text.new_zeros(9)])])
    found = ours.embed(right, torch.tensor([[1] * 40, [1] * 31 + [0] * 9]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.embed(ids[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_what_is_not_computed_is_refused_by_name(tmp_path):
    lm.write(tmp_path, {**lm.LLAMA, "model_type": "qwen3_moe"}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="experts"):
        CausalLM.from_pretrained(tmp_path)
