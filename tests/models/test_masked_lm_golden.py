"""MaskedLM against what the authors' code computed in float32, and against their formulas."""

from __future__ import annotations

import crammed
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nomatmul.models import FFF, MaskedLM

UNIT = 2.0**-24  # half a unit in the last place of 1, what one float32 operation may be off by


def tolerance(logits: torch.Tensor, layers: int, size: int) -> float:
    """How far two float32 computations of these logits may differ in some element.

    One product of `size` terms has an error of about sqrt(size) * UNIT of its result's size (terms
    round independently). Embedding and its norm, five such stages a layer of attention (norm, q
    and k, softmax, v, output) and three of a feed-forward layer, the last norm and the head are
    added up in the residual stream, which a norm ends: independent errors again add as a root of
    squares. Twice that, for either side has its own. The largest of many elements is some four
    standard deviations off, and the head's result is as large as its largest logit.
    """
    stages = 2 + layers * (5 + 3) + 2
    spread = logits.double().std().item()
    return 4 * 2 * (stages * size) ** 0.5 * UNIT * spread


@pytest.fixture(scope="module")
def trace(crammed_tiny) -> dict[str, torch.Tensor]:
    return load_file(crammed_tiny / "golden.safetensors")


@torch.no_grad()
def run(model, ids, mask) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and for every FFF layer the visited rows [B, T, trees, levels]."""
    paths: list[torch.Tensor] = []

    def look(layer: FFF, arguments: tuple) -> None:
        x = arguments[0]
        paths.append(layer.walk_and_sum(x.flatten(0, 1))[2].unflatten(0, x.shape[:2]))

    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, FFF)
    ]
    logits = model(ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return logits, paths


@pytest.mark.parametrize("implementation", ["masked", "naive", None])
@pytest.mark.parametrize("masked", [True, False])
def test_the_recorded_run(crammed_tiny, trace, implementation, masked):
    model = MaskedLM.from_pretrained(crammed_tiny)
    for layer in model.layers:
        layer.channel.implementation = implementation
    mask = trace["attention_mask"] if masked else None
    expected = trace["logits" if masked else "logits_nomask"]
    logits, paths = run(model, trace["input_ids"], mask)
    limit = tolerance(expected, layers=2, size=64)
    assert limit < 1e-4  # 7.1e-5, where logits reach 22.8
    assert (logits - expected).abs().max() < limit
    if masked:  # paths were recorded with the mask, position by position: token t of sequence b
        for number, path in enumerate(paths):
            recorded = trace[f"path.{number}"].unflatten(0, (40, 3)).transpose(0, 1)
            assert torch.equal(path, recorded)


def test_the_recorded_run_is_float32_noise_away_from_exact_arithmetic(crammed_tiny, trace):
    model = MaskedLM.from_pretrained(crammed_tiny).double()
    for mask, name in ((trace["attention_mask"], "logits"), (None, "logits_nomask")):
        logits, _ = run(model, trace["input_ids"], mask)
        limit = tolerance(trace[name], layers=2, size=64)
        assert (logits - trace[name]).abs().max() < limit


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("variant", crammed.VARIANTS)
def test_every_variant_computes_the_authors_formulas(tmp_path, variant, pickled):
    values = crammed.config(crammed.VARIANTS[variant])
    stored = crammed.tensors(values)
    crammed.write(tmp_path, values, stored, pickled)
    model = MaskedLM.from_pretrained(tmp_path)
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 48, (3, 11))
    mask = np.ones((3, 11))
    mask[0, 7:], mask[1, :4], mask[1, 8] = 0, 0, 0  # padding behind, in front and in between
    for padding in (None, mask):
        expected = torch.from_numpy(crammed.logits(values, stored, ids, padding))
        given = None if padding is None else torch.from_numpy(padding)
        logits, _ = run(model, torch.from_numpy(ids), given)
        assert (logits - expected).abs().max() < tolerance(expected, layers=2, size=16)


@torch.no_grad()
def test_a_row_that_is_all_padding_looks_everywhere(tmp_path):
    """As the authors' mask does, which adds the same number to every score."""
    values = crammed.config()
    model = MaskedLM.from_pretrained(crammed.write(tmp_path, values, crammed.tensors(values)))
    ids = torch.arange(1, 9).unsqueeze(0)
    logits = model(ids, attention_mask=torch.zeros(1, 8)).logits
    assert torch.allclose(logits, model(ids).logits, atol=1e-5)
