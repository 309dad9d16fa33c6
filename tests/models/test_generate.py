"""`generate` of transformers on our models: equal with and without a cache, in every mode."""

from __future__ import annotations

import inspect

import pytest
import torch
from dials import DIALS
from transformers import DynamicCache

from nomatmul.models import CausalLM, RecurrentCache
from nomatmul.models.hf.cache import CACHE_NAMES, cache_of

MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 12, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
MIXERS = ("matmul-free", "transformer++", "ternary attention", "union", "scales of groups")


def padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose second row begins with five places of padding."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


def run(model: CausalLM, ids: torch.Tensor, **options) -> torch.Tensor:
    torch.manual_seed(11)
    return model.generate(ids, max_new_tokens=6, pad_token_id=0, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MIXERS)
def test_a_cache_changes_no_token(build, ids, name, mode):
    model = build(name)
    rows, mask = padded(ids)
    for prompt, attention_mask in ((ids, None), (ids, torch.ones_like(ids)), (rows, mask)):
        options = {**MODES[mode], "attention_mask": attention_mask}
        cached = run(model, prompt, use_cache=True, **options)
        assert torch.equal(cached, run(model, prompt, use_cache=False, **options))


@pytest.mark.parametrize("name", MIXERS[:2])
def test_every_step_after_the_first_reads_one_token(build, ids, name):
    model, lengths = build(name), []
    model.embedding.register_forward_hook(lambda _m, given, _out: lengths.append(given[0].shape[1]))
    run(model, ids, do_sample=False)
    assert lengths == [17, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", MIXERS[:2])
@pytest.mark.parametrize("keyword", CACHE_NAMES)
def test_a_text_goes_on_from_its_cache(build, ids, name, keyword):
    model = build(name)
    whole = run(model, ids, do_sample=False)
    with torch.no_grad():
        first = model(ids[:, :9], use_cache=True)
        assert isinstance(
            cache_of(first), RecurrentCache if name == "matmul-free" else DynamicCache
        )
    again = run(model, ids, do_sample=False, **{keyword: cache_of(first)})
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", MIXERS[:2])
def test_a_prompt_in_chunks_is_the_same_prompt(build, ids, name):
    model = build(name)
    rows, mask = padded(ids)
    for prompt, attention_mask in ((ids, None), (rows, mask)):
        options = {"attention_mask": attention_mask, "do_sample": False}
        chunked = run(model, prompt, prefill_chunk_size=4, **options)
        assert torch.equal(chunked, run(model, prompt, **options))


@pytest.mark.parametrize("name", MIXERS[:2])
def test_embeddings_as_a_prompt(build, ids, name):
    model = build(name)
    prompt = model.embedding(ids).detach()
    made = [
        run(model, None, inputs_embeds=prompt, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(made[0], run(model, ids, do_sample=False)[:, 17:])
    assert torch.equal(*made)


def test_assisted_generation_is_refused_by_name(build, ids):
    with pytest.raises(ValueError, match=r"assisted generation .* CausalLM"):
        run(build(), ids[:1], assistant_model=build(), do_sample=False)


@pytest.mark.parametrize("keyword", CACHE_NAMES)
@torch.no_grad()
def test_forward_takes_the_cache_under_either_name(build, ids, keyword):
    model = build()
    cache = cache_of(model(ids[:, :9], use_cache=True))
    rest = model(ids[:, 9:], **{keyword: cache}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 9:], rtol=0, atol=2e-5)
    assert "cache" in inspect.signature(model.forward).parameters
    both = dict.fromkeys(CACHE_NAMES, cache)
    assert model(ids[:, :1], **both).logits.shape == (2, 1, 64)
    both[keyword] = cache.fork()
    with pytest.raises(ValueError, match="two caches"):
        model(ids[:, :1], **both)


@torch.no_grad()
def test_only_some_logits(build, ids):
    model = build()
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    places = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=places).logits, whole[:, places])


@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_what_would_change_the_result_is_not_swallowed(build, ids, name):
    model = build(name)
    for word, value in {
        "num_logits_to_keep": 1,
        "past_key_value": RecurrentCache(2),
        "encoder_hidden_states": torch.ones(2, 3, 32),
        "output_attentions": True,
        "cu_seq_lens_q": torch.tensor([0, 17]),
        "atention_mask": torch.ones_like(ids),
    }.items():
        with pytest.raises(ValueError, match=word) as raised:
            model(ids, **{word: value})
        assert isinstance(raised.value, TypeError)
    kept = model(ids).logits
    harmless = {"token_type_ids": torch.zeros_like(ids), "output_attentions": False, "odd": None}
    assert torch.equal(model(ids, **harmless, cache_position=torch.arange(17)).logits, kept)


@torch.no_grad()
def test_switches_of_the_config_hold(build, ids):
    model = build()
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(ids, use_cache=False), tuple)
