"""Published ternary transformers, in each form that they are stored in, against transformers' own
classes: the same files, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import published_lm as lm
from torch import Tensor
from transformers import AutoModelForCausalLM

from nomatmul.models import BitLinear, CausalLM, DenseLinear, StoredLinear
from nomatmul.models.hf.cache import cache_of

Writer = Callable[[Path, np.random.Generator], Path]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def packed(values: dict[str, Any], legacy: bool, **options: Any) -> Writer:
    norm = "rms_norm" if options.get("use_rms_norm") else ""

    def write(at: Path, rng: np.random.Generator) -> Path:
        model = lm.random_model(values, rng, inner_norm=norm)
        return lm.write_packed(at, model, legacy=legacy, **options)

    return write


def unpacked(values: dict[str, Any]) -> Writer:
    return lambda at, rng: lm.write_unpacked(at, lm.random_model(values, rng))


def masters(values: dict[str, Any]) -> Writer:
    return lambda at, rng: lm.write_masters(at, lm.random_model(values, rng), rng)


def valued(values: dict[str, Any], **options: Any) -> Writer:
    return lambda at, rng: lm.write_values(at, lm.random_model(values, rng, **options))


def dense(values: dict[str, Any], scaling: str = "") -> Writer:
    def write(at: Path, rng: np.random.Generator) -> Path:
        model = lm.random_model(values, rng)
        floats = {
            n: lm.bfloat16(rng.standard_normal(w.shape) / 8) for n, w in model.weights().items()
        }
        more = {"rope_scaling": SCALINGS[scaling]} if scaling else {}
        return lm.write(at, {**values, **more}, {**model.floats, **floats})

    return write


TIED = {"tie_word_embeddings": True}
INT8 = {
    "bitnet, packed": packed(lm.BITNET, legacy=False),
    "bitnet, unpacked": unpacked(lm.BITNET),
    "bitnet, masters": masters(lm.BITNET),
    "llama, packed, scales divide": packed(lm.LLAMA, legacy=True),
    "llama, packed": packed(lm.LLAMA, legacy=False),
    "qwen3, norms inside": packed(lm.QWEN3, legacy=False, use_rms_norm=True, rms_norm_eps=1e-6),
}
FLOATS = {
    "qwen3, groups, all ternary": valued(lm.QWEN3, group=32, ternary_head=True),
    "qwen3, groups, tied": valued({**lm.QWEN3, **TIED}, group=32, ternary_head=True),
    "qwen3, groups, dense head": valued(lm.QWEN3, group=32),
    "llama, a scale a tensor": valued({**lm.LLAMA, "head_dim": 16}),
    "llama, dense": dense(lm.LLAMA),
    "qwen3, dense, tied": dense({**lm.QWEN3, **TIED}),
    **{f"llama, dense, {kind}": dense(lm.LLAMA, kind) for kind in SCALINGS},
}
ALL = {**INT8, **FLOATS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[CausalLM, Any, Path]]:
    """models(name) -> (ours, transformers', the directory)."""
    made: dict[str, tuple[CausalLM, Any, Path]] = {}

    def get(name: str) -> tuple[CausalLM, Any, Path]:
        if name not in made:
            at = ALL[name](tmp_path_factory.mktemp("published") / "model", np.random.default_rng(5))
            theirs = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
            for module in theirs.modules():
                if type(module).__name__ == "BitLinear":  # the legacy one keeps a type of its own
                    module.dtype = torch.float32
            made[name] = CausalLM.from_pretrained(at).eval(), theirs, at
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _plain_bit_linear() -> Iterator[None]:
    """transformers compiles the quantisers of its legacy BitLinear, for nothing here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids, mask


def close(name: str, found: Tensor, expected: Tensor) -> float:
    """Assert that logits [N, V] agree as well as their arithmetic lets them; returns the error."""
    error = float((found - expected).norm() / expected.norm())
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    assert error < (3e-2 if name in INT8 else 1e-5)
    assert same >= 0.97
    return error


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_are_those_of_transformers(models, name):
    ours, theirs, _ = models(name)
    ids, mask = prompts()
    expected = theirs(ids).logits.flatten(0, 1)
    error = close(name, ours(ids).logits.flatten(0, 1), expected)
    real = mask.bool()
    expected_real = theirs(ids, attention_mask=mask).logits[real]
    close(name, ours(ids, attention_mask=mask).logits[real], expected_real)
    first = ours(ids[:, :25], attention_mask=mask[:, :25], use_cache=True)
    rest = ours(ids[:, 25:], attention_mask=mask, cache=cache_of(first))
    both = torch.cat([first.logits, rest.logits], 1)
    close(name, both[real], expected_real)
    assert expected.std() > 100 * error  # logits that say something


@pytest.mark.parametrize("name", ["bitnet, packed", "llama, packed, scales divide", *FLOATS])
@torch.no_grad()
def test_greedy_texts_part_at_a_near_tie_only(models, name):
    ours, theirs, _ = models(name)
    ids, mask = prompts()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = ours.generate(ids, attention_mask=mask, **options)
    expected = theirs.generate(ids, attention_mask=mask, **options)
    limit = 3e-2 if name in INT8 else 1e-4
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        if torch.equal(a, b):
            continue
        at = int((a != b).nonzero()[0])
        logits = theirs(b[None, :at], attention_mask=_longer(mask[row], at)).logits[0, -1]
        best, second = logits.topk(2).values
        assert best - second < 2 * limit * logits.norm()


def _longer(mask: Tensor, length: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(length - len(mask))])[None]


@pytest.mark.parametrize("name", ["bitnet, packed", "llama, packed, scales divide"])
def test_ternary_values_are_stored_as_they_are(models, name):
    ours, _, _ = models(name)
    model = lm.random_model(lm.BITNET if "bitnet" in name else lm.LLAMA, np.random.default_rng(5))
    t, scale = model.ternary["model.layers.1.self_attn.o_proj"]
    layer = ours.layers[1].mixer.o_proj
    assert isinstance(layer, StoredLinear)
    np.testing.assert_array_equal(layer.values.numpy(), t)
    np.testing.assert_allclose(layer.scale.numpy(), scale[0], rtol=1e-7)
    assert (layer.norm is not None) == ("bitnet" in name)
    gates = [model.ternary[f"model.layers.0.mlp.{part}_proj"][0] for part in ("gate", "up")]
    np.testing.assert_array_equal(ours.layers[0].channel.gate_proj.values, np.concatenate(gates))
    assert isinstance(ours.head, DenseLinear)
    assert not any(isinstance(module, BitLinear) for module in ours.modules())


def test_a_model_that_is_not_computed_is_refused_by_name(tmp_path):
    lm.write(tmp_path, {**lm.LLAMA, "model_type": "qwen3_moe"}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="experts"):
        CausalLM.from_pretrained(tmp_path)
