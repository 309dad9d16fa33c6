"""Attention of published transformers against a float64 form written out, and among recurrences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.rotary import RopeScaling, frequencies, tables
from nomatmul.models import Attention, DenseLinear, StateCache
from nomatmul.models.hf.cache import cache_of
from nomatmul.models.mixers.attention import rotary_angles

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)


def make(**dials: object) -> Attention:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=32,
        num_layers=1,
        intermediate_size=32,
        token_mixer="attention",
        linear="dense",
        **{"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, **dials},
    )
    part = architecture_of(config).blocks[0].mixer
    torch.manual_seed(5)
    mixer = Attention.of(part, 0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def written_out(mixer: Attention, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[T, D] -> [T, D] in float64, head by head."""
    steps, size = len(x), mixer.head_size
    inverse, factor = frequencies(size, mixer.rope_theta, mixer.rope_scaling)
    angle = torch.arange(steps)[:, None] * torch.from_numpy(inverse)
    cos, sin = angle.cos() * factor, angle.sin() * factor

    def heads(name: str) -> list[Tensor]:
        found = (x @ weights[f"{name}_proj.weight"].T).split(size, -1)
        norm = weights.get(f"{name}_norm.weight")
        if norm is not None:
            found = [
                h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * norm for h in found
            ]
        return list(found)

    def rotated(h: Tensor) -> Tensor:
        a, b = h.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    keys, values = [rotated(k) for k in heads("k")], heads("v")
    later = torch.ones(steps, steps).triu(1).bool()
    outputs = []
    for index, q in enumerate(heads("q")):
        served = index // (mixer.num_heads // mixer.num_kv_heads)
        scores = rotated(q) @ keys[served].T / math.sqrt(size)
        outputs.append(scores.masked_fill(later, -math.inf).softmax(-1) @ values[served])
    return torch.cat(outputs, -1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_values_and_gradients_are_those_of_the_form_written_out(norms, scaling):
    mixer = make(qk_norm=norms, rope_scaling=scaling)
    x, grad = torch.randn(7, 32), torch.randn(7, 32)
    ours = [x.clone().requires_grad_(), *mixer.parameters()]
    wide = {n: p.detach().double().requires_grad_() for n, p in mixer.named_parameters()}
    theirs = [x.double().requires_grad_(), *wide.values()]
    out = mixer(ours[0][None])[0]
    expected = written_out(mixer, wide, theirs[0])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad((out * grad).sum(), ours)
    wanted = torch.autograd.grad((expected * grad).sum(), theirs)
    assert len(got) == (7 if norms else 5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_angles_are_those_of_every_room():
    positions = torch.tensor([[0, 3, 100_000]])
    cos, sin = rotary_angles(positions, 8, 10000.0, YARN)
    wanted = tables(positions.numpy(), *frequencies(8, 10000.0, YARN))
    for found, expected in zip((cos, sin), wanted, strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-7, atol=1e-9)


@torch.no_grad()
def test_recurrences_and_attention_share_a_cache(build, ids):
    """A model of both kinds of layers: one state of fixed size, one that grows."""
    model = build()
    torch.manual_seed(6)
    model.layers[1].mixer = Attention(32, 4, layer=1)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :9], use_cache=True)
    cache = cache_of(first)
    assert isinstance(cache, StateCache)
    fork = cache.fork()
    for kept in (cache, fork):
        rest = model(ids[:, 9:], cache=kept).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)
    assert [sorted(state) for state in cache.states] == [["h"], ["k", "v"]]
    assert cache.states[1]["k"].shape == (2, 4, 17, 8)
    assert cache.nbytes == 4 * 2 * (32 + 2 * 17 * 32)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found = [
            model.generate(
                ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, use_cache=use, **options
            )
            for use in (True, False)
        ]
        assert torch.equal(*found)
    assert isinstance(model.layers[1].mixer.q_proj, DenseLinear)
