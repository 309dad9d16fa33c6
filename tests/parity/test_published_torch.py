"""Published transformers, random weights: the oracle, and the engine with what is packed, against
transformers' own classes in float32.

Where activations are int8, a last bit of a float may turn a rounding, so errors are compared over
all positions; the oracle's float path of weights-only and dense models has none of that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.published_lm import BITNET, QWEN3, bfloat16, random_model, write, write_masters
from support.published_torch import FLOATS, INT8, ONE_BY_ONE, ids_of, transformers_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

import nomatmul
from nomatmul.convert import pack
from nomatmul.convert.check import mean_kl
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.reference.model import ReferenceModel


@pytest.fixture(autouse=True)
def plain_torch():
    """transformers compiles small functions of its BitLinear: not here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def transformers_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return transformers_model(directory)(torch.from_numpy(ids)).logits.numpy()


def oracle_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    return ReferenceModel.from_checkpoint(open_checkpoint(directory)).forward(ids).logits_BTV


def packed_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """Of the packed model in the engine; its head and embedding lose nothing."""
    pack(directory, directory / "packed", check=False, head="float32")
    model = nomatmul.load(directory / "packed")
    return np.stack([model.logits(row) for row in ids])


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def kl(found, wanted):
    """Mean KL of the next token, logits scaled to a standard deviation of 2."""
    scale, rows = 2 / wanted.std(), (-1, wanted.shape[-1])
    return mean_kl(scale * wanted.reshape(rows), scale * found.reshape(rows))


@pytest.mark.parametrize("kind", INT8, ids=lambda kind: kind.__name__)
def test_models_with_int8_activations(tmp_path, rng, kind):
    directory, ids = kind(tmp_path, rng), ids_of(rng)
    wanted = transformers_logits(directory, ids)
    assert error(oracle_logits(directory, ids), wanted) < 1e-2
    found = packed_logits(directory, ids)
    assert error(found, wanted) < 3e-2
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.95


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.filterwarnings("ignore:the head is ternary")
def test_models_with_float_activations(tmp_path, rng, kind):
    directory, ids = FLOATS[kind](tmp_path, rng), ids_of(rng)
    wanted = transformers_logits(directory, ids)
    assert error(oracle_logits(directory, ids), wanted) < 1e-5
    found = packed_logits(directory, ids)
    ternary = open_checkpoint(directory).config.linear == "ternary"
    assert kl(found, wanted) < (2e-3 if ternary else 1e-6)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_block_by_block(tmp_path, rng, kind):
    """Each block from the states that transformers' had: a token is equal but for the order of
    sums, or one of its some 500 roundings to int8 went the other way."""
    directory, ids = ONE_BY_ONE[kind](tmp_path, rng), ids_of(rng)
    with torch.no_grad():
        out = transformers_model(directory)(torch.from_numpy(ids), output_hidden_states=True)
    states = [state.numpy() for state in out.hidden_states]  # the last one is normed
    oracle = ReferenceModel.from_checkpoint(open_checkpoint(directory))
    tokens, _ = oracle._tokens(np.ones(ids.shape, bool), None, None)
    errors = []
    for layer, block in enumerate(oracle.blocks):
        found = block(states[layer], block.new_state(len(ids)), tokens)[0]
        last = layer + 1 == len(oracle.blocks)
        found, wanted = oracle.final_norm(found) if last else found, states[layer + 1]
        errors += list(np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1))
    errors = np.concatenate(errors)
    turned = np.mean(errors > 1e-5)  # none where this was written; a BLAS may sum otherwise
    assert turned <= (0 if kind in FLOATS else 0.05)
    assert errors.max() < 5e-2


def test_a_norm_inside_each_linear_of_qwen3(tmp_path, rng):
    """BitNet-embedding's form has no class of its own: Qwen3 with AutoBitLinear is the same."""
    model = random_model({**QWEN3, "tie_word_embeddings": True}, rng, inner_norm="norm")
    for name, (t, _) in model.ternary.items():
        model.floats[f"{name}.weight"] = bfloat16(rng.standard_normal(t.shape) / 8)
    bare = {name.removeprefix("model."): tensor for name, tensor in model.floats.items()}
    write(tmp_path, model.values, bare)
    theirs = Qwen3ForCausalLM(Qwen3Config(**model.values)).eval()
    for name in model.ternary:
        linear = theirs.get_submodule(name)
        sizes, how = (linear.in_features, linear.out_features), {"online_quant": True}
        bit = AutoBitLinear(*sizes, bias=False, use_rms_norm=True, rms_norm_eps=1e-6, **how)
        theirs.set_submodule(name, bit)
    renamed = {n.replace("_proj.norm", "_proj.rms_norm"): t for n, t in model.floats.items()}
    state = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in renamed.items()}
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert (missing, extra) == (["lm_head.weight"], [])
    ids = ids_of(rng)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    assert error(oracle_logits(tmp_path, ids), wanted) < 1e-2
    assert error(packed_logits(tmp_path, ids), wanted) < 3e-2


def test_the_first_bitnet_is_the_newer_one_with_silu(tmp_path, rng):
    """1bitLLM's code is no class of transformers: BitNet with SiLU, under other names, is."""
    model = random_model({**BITNET, "hidden_act": "silu", "tie_word_embeddings": False}, rng)
    write_masters(tmp_path / "new", model, rng)
    ids = ids_of(rng)
    wanted = transformers_logits(tmp_path / "new", ids)
    renamed = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): t
        for name, t in load_file(tmp_path / "new" / "model.safetensors").items()
    }
    first = {**model.values, "model_type": "llama", "weight_bits": 1, "input_bits": 8}
    write(tmp_path / "first", first, {name: t.numpy() for name, t in renamed.items()})
    assert error(oracle_logits(tmp_path / "first", ids), wanted) < 1e-2
    assert error(packed_logits(tmp_path / "first", ids), wanted) < 3e-2
