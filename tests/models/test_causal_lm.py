"""The model's promises: one state whatever the way there, gradients, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dials import DIALS

from nomatmul.models import GLU, MLGRU, BitLinear, CausalLM, CausalLMConfig, StateCache

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_pieces_with_a_cache_equal_the_whole(build, ids, name):
    model = build(name)
    whole = model(ids, use_cache=False).logits
    cache, parts = None, []
    for piece in ids.split([9, 1, 1, 6], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert cache.get_seq_length() == 17


@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_left_padded_equals_unpadded(build, ids, name):
    model = build(name)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    got = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(got, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_generate_batched_left_padded_equals_alone(build, ids, name):
    model = build(name)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompts = [ids[0, :9], ids[1, :4]]
    alone = [
        model.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :]
        for p in prompts
    ]
    rows = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, p in enumerate(prompts):
        rows[row, 9 - len(p) :] = p
        mask[row, 9 - len(p) :] = 1
    for use_cache in (True, False):
        both = model.generate(rows, attention_mask=mask, use_cache=use_cache, **options)
        assert torch.equal(both[:, 9:], torch.stack(alone))


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_generate_samples_and_searches_beams(build, ids, name):
    model = build(name)
    common = {"max_new_tokens": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(3)
    first = model.generate(ids, do_sample=True, top_k=10, temperature=0.8, **common)
    torch.manual_seed(3)
    again = model.generate(ids, do_sample=True, top_k=10, temperature=0.8, **common)
    assert torch.equal(first, again)
    cached = model.generate(ids, num_beams=3, do_sample=False, **common)
    plain = model.generate(ids, num_beams=3, do_sample=False, use_cache=False, **common)
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_forked_state_is_independent(build, ids):
    model = build()
    cache = model(ids[:, :8], use_cache=True).past_key_values
    fork = cache.fork()
    model(ids[:, 8:12], past_key_values=cache)
    expected = model(ids).logits[:, 8:12]
    again = model(ids[:, 8:12], past_key_values=fork).logits
    torch.testing.assert_close(again, expected, **CLOSE)
    assert fork.nbytes == 2 * 2 * 32 * 4
    with pytest.raises(ValueError, match="recurrent state"):
        fork.crop(1)


@pytest.mark.parametrize("name", DIALS)
def test_every_parameter_learns_and_checkpointing_changes_nothing(build, ids, name):
    model = build(name).train()
    plain = model(ids, labels=ids)
    assert plain.logits is None
    plain.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.abs().max() > 0 for g in grads.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, grads[n]), n


@torch.no_grad()
def test_losses_agree(build, ids):
    model = build()
    labelled = model(ids, labels=ids)
    direct, _ = model.loss(ids[:, :-1], ids[:, 1:], chunk=7)
    logprobs = np.concatenate([model.token_logprobs(row.tolist()) for row in ids])
    assert logprobs.dtype == np.float64
    assert labelled.logits is not None
    assert labelled.loss.item() == pytest.approx(direct.item(), rel=1e-5)
    assert labelled.loss.item() == pytest.approx(-logprobs.mean(), rel=1e-5)
    assert model.token_logprobs([5]).shape == (0,)


def test_hidden_states_embeddings_and_tuples(build, ids):
    model = build()
    out = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == 3
    assert out.logits.shape == (2, 1, 64)
    by_embedding = model(inputs_embeds=model.embedding(ids), return_dict=False)
    torch.testing.assert_close(by_embedding[0][:, -1:], out.logits)


def test_layers_work_alone():
    x = torch.randn(2, 5, 16)
    assert BitLinear(16, 24)(x).shape == (2, 5, 24)
    assert GLU(16, 24)(x).shape == x.shape
    mixer = MLGRU(16)
    y, state = mixer.step(x)
    pieces = mixer(x[:, :3]), mixer.step(x[:, :3])[1]
    torch.testing.assert_close(mixer(x[:, 3:], state=pieces[1]), y[:, 3:], **CLOSE)
    assert state.dtype == torch.float32
    with pytest.raises(ValueError, match="linear 'binary'"):
        MLGRU(16, linear="binary")


def test_initial_weights():
    """Xavier in MLGRU, normal elsewhere, down_proj divided by sqrt(2 L), lower bounds at zero."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_layers": 8, "intermediate_size": 256}
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(**sizes, initializer_range=0.1))
    block = model.layers[3]
    expected = {
        block.mixer.o_proj: 2**-2.5 / 128**0.5,
        block.mixer.i_proj: 2**-2.5 / 128**0.5,
        block.channel.gate_proj: 0.1,
        block.channel.down_proj: 0.1 / 4,
        model.head: 0.1,
    }
    for layer, std in expected.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not model.lower_bounds.any()
    twin = CausalLM(
        CausalLMConfig(
            **sizes, initializer_range=0.1, token_mixer="attention", linear="dense", num_heads=4
        )
    )
    assert twin.layers[0].mixer.o_proj.weight.std().item() == pytest.approx(0.025, rel=0.05)
    assert not any("norm" in n and "proj" in n for n, _ in twin.named_parameters())


def test_tensor_names_are_the_formats(build):
    from nomatmul.formats.architecture import architecture_of

    for name in DIALS:
        model = build(name)
        ours = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert ours == architecture_of(model.config.model_config).tensors()


def test_bad_input_is_named(build, ids):
    model = build()
    with pytest.raises(ValueError, match="token id 64 is out of range"):
        model(torch.tensor([[1, 64]]))
    with pytest.raises(ValueError, match="token id -1"):
        model(torch.tensor([[-1, 3]]))
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    for odd in ([[1, 2]], torch.tensor([[1.0]]), torch.tensor([[True]])):
        with pytest.raises(ValueError, match="tensor of whole numbers"):
            model(odd)
    with pytest.raises(ValueError, match="batch, length"):
        model(ids[0])
    with pytest.raises(ValueError, match="either input_ids or"):
        model()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="does not fit"):
        model(ids, past_key_values=object())
    with pytest.raises(ValueError, match="at least one token"):
        model.token_logprobs([])
    with pytest.raises(ValueError, match="'rotary' or 'none', not 'sinusoidal'"):
        build("transformer++", positions="sinusoidal")
    with pytest.raises(ValueError, match="encoder"):
        build(causal=False)


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown config key 'hiden_size'"):
        CausalLMConfig(hiden_size=3)
    with pytest.raises(ValueError, match="token_mixer 'gru'"):
        CausalLMConfig(token_mixer="gru")
    config = CausalLMConfig(vocab_size=99, num_hidden_layers=3)
    assert config.num_layers == config.num_hidden_layers == 3
    assert config.model_config.vocab_size == 99


def test_cache_selects_sequences():
    """Every piece of every layer follows, those that grow, too."""
    cache = StateCache(2)
    cache.states[0]["h"] = torch.arange(6.0).reshape(3, 2)
    keys = torch.arange(6.0).reshape(3, 1, 2, 1)
    cache.update(keys[:, :, :1], keys[:, :, :1] + 10, 1)
    k, v = cache.update(keys[:, :, 1:], keys[:, :, 1:] + 10, 1)
    assert torch.equal(k, keys)
    assert torch.equal(v, keys + 10)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.states[0]["h"].tolist() == [[4, 5], [0, 1], [0, 1]]
    assert cache.states[1]["v"].flatten(1).tolist() == [[14, 15], [10, 11], [10, 11]]
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.states[0]["h"].tolist() == [[4, 5], [4, 5]]
    assert cache.states[1]["k"].flatten(1).tolist() == [[4, 5], [4, 5]]
    copy = cache.fork()
    cache.states[0]["h"] += 1
    assert copy.states[0]["h"].tolist() == [[4, 5], [4, 5]]
    assert cache.nbytes == 4 * (4 + 4 + 4)
    assert len(cache) == 2
    cache.reset()
    assert cache.states == [{}, {}]


@pytest.mark.parametrize(
    "name", ["matmul-free", "transformer++", "no norms inside", "scales of groups"]
)
def test_compiles_into_one_graph(build, ids, name):
    """No graph break, forward or backward, and the numbers stay; the tracer only, no C++."""
    model = build(name, num_layers=1, use_lower_bound=False).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, model.loss):
        loss, _ = function(ids, ids)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_compiles_with_the_default_backend(build, ids, name):
    model = build(name).train()
    torch._dynamo.reset()
    compiled, _ = torch.compile(model.loss, fullgraph=True)(ids, ids)
    compiled.backward()
    plain, _ = model.loss(ids, ids)
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-3)
