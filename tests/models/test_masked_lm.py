"""Encoders and the masked language model: padding, the sparse loss, initial weights, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from encoders import DIALS, SIZES, build, some_ids, some_labels

from nomatmul.models import Encoder, EncoderConfig, FFFTraining, MaskedLM


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DIALS)
def test_every_parameter_learns(name):
    model = build(MaskedLM, name).train()
    ids = some_ids(8, 24)
    model.set_fff_training(FFFTraining(route_gradient=True))
    found = gradients(model, model.loss(ids, some_labels(ids))[0])
    assert found.keys() == {parameter for parameter, _ in model.named_parameters()}
    for parameter, gradient in found.items():
        assert gradient.isfinite().all(), parameter
        assert gradient.abs().max() > 0, parameter


@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_padding_is_not_seen(name):
    """A sequence alone, the same one padded behind, and other tokens under the padding."""
    model, ids = build(MaskedLM, name), some_ids(1, 11)
    alone = model(ids).logits
    mask = torch.ones(2, 19)
    mask[:, 11:] = 0
    padded = torch.cat([ids, torch.zeros_like(ids[:, :8])], 1)
    other = torch.cat([ids, some_ids(1, 8)], 1)
    both = model(torch.cat([padded, other]), attention_mask=mask).logits[:, :11]
    assert torch.equal(both[0], both[1])
    assert torch.allclose(both[:1], alone, atol=1e-5)


@torch.no_grad()
def test_attention_looks_both_ways():
    model, ids = build(MaskedLM), some_ids(1, 9)
    changed = ids.clone()
    changed[0, 8] = 3
    assert ids[0, 8] != 3
    assert not torch.allclose(model(changed).logits[0, 0], model(ids).logits[0, 0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "blind"), [("bert", False), ("no channel mixer", True)])
def test_positions(name, blind):
    """Without positions, tokens in another order give the same states in that order."""
    model, ids = build(MaskedLM, name), some_ids(1, 9)
    same = torch.allclose(model(ids.flip(1)).logits.flip(1), model(ids).logits, atol=1e-5)
    assert same is blind


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "ternary", "no channel mixer"])
def test_the_loss_is_the_mean_over_labels(name):
    model, ids = build(MaskedLM, name), some_ids()
    labels = some_labels(ids)
    loss, z = model.loss(ids, labels)
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(loss, expected, rtol=1e-6)
    counted = logits.flatten(0, 1)[labels.flatten() != -100]
    assert torch.allclose(z, counted.logsumexp(-1).square().mean(), rtol=1e-6)
    assert torch.equal(model(ids, labels=labels).loss, loss)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels[1, 12:] = -100
    logits = model(ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(model.loss(ids, labels, mask)[0], expected, rtol=1e-6)


def test_a_known_number_of_labels_changes_nothing():
    model, ids = build(MaskedLM, "ultrafastbert").train(), some_ids()
    labels = some_labels(ids)
    loss, z = model.loss(ids, labels)
    expected = gradients(model, loss + z)
    for predicted in (8, 20, 34):
        other, other_z = model.loss(ids, labels, predicted=predicted, chunk=5)
        assert torch.allclose(other, loss, rtol=1e-6)
        for name, gradient in gradients(model, other + other_z).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
    assert model.loss(ids, labels, predicted=7)[0].isnan()  # one label would be lost
    with pytest.raises(ValueError, match="predicted must be at least 1, got 0"):
        model.loss(ids, labels, predicted=0)


def test_only_labelled_tokens_go_through_the_head():
    model, ids, seen = build(MaskedLM).train(), some_ids(), []
    model.head.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape))
    model.loss(ids, some_labels(ids))
    assert model(ids, labels=some_labels(ids)).logits is None
    assert seen == [(8, 32), (8, 32)]


def test_no_labels_at_all_give_loss_zero():
    model, ids = build(MaskedLM), some_ids()
    for predicted in (None, 4):
        loss, z = model.loss(ids, torch.full_like(ids, -100), predicted=predicted)
        assert loss == 0
        assert z == 0


def test_the_loss_compiles_into_one_graph():
    model, ids = build(MaskedLM, "ultrafastbert", num_layers=1).train(), some_ids()
    labels = some_labels(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    for options in ({"predicted": 8}, {}):
        loss, _ = compiled(ids, labels, **options)
        assert torch.allclose(loss, model.loss(ids, labels)[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["bert", "ultrafastbert"])
def test_recomputation_changes_nothing(name):
    model, ids = build(MaskedLM, name).train(), some_ids()
    labels, mask = some_labels(ids), torch.ones(2, 17)
    mask[0, 14:] = 0
    expected = gradients(model, model.loss(ids, labels, mask)[0])
    for mode in ("mlp", "block"):
        model.set_recompute(mode)
        for name_, gradient in gradients(model, model.loss(ids, labels, mask)[0]).items():
            assert torch.allclose(gradient, expected[name_], rtol=1e-5, atol=1e-7), name_
    model.set_recompute("none")
    model.gradient_checkpointing_enable()
    for name_, gradient in gradients(model, model.loss(ids, labels, mask)[0]).items():
        assert torch.allclose(gradient, expected[name_], rtol=1e-5, atol=1e-7), name_


def test_autocast_and_float64():
    model, ids = build(MaskedLM, "ultrafastbert"), some_ids()
    labels = some_labels(ids)
    loss, _ = model.loss(ids, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = model.loss(ids, labels)
    assert half.dtype == torch.float32
    assert abs(half - loss) < 0.05 * loss
    wide, _ = model.double()(ids, labels=labels, return_dict=False)[:2]
    assert abs(wide - loss.double()) < 1e-5 * loss


def test_the_auxiliary_loss_is_that_of_the_trees():
    model, ids = build(MaskedLM, "ultrafastbert").train(), some_ids()
    model.loss(ids, some_labels(ids))
    assert model.auxiliary_loss() == 0
    model.set_fff_training(FFFTraining(balance=0.5))
    model.loss(ids, some_labels(ids))
    assert 0 < model.auxiliary_loss() < 2
    assert model.auxiliary_loss() == 0


# -- initial weights ------------------------------------------------------------------------------


def test_initial_weights_are_the_authors():
    torch.manual_seed(0)
    model = MaskedLM(
        EncoderConfig(vocab_size=512, hidden_size=128, num_heads=4, num_layers=1, pad_token_id=5,
                      channel_mixer="fff", fff_trees=2, fff_depth=4, fff_bias=True)
    )  # fmt: skip
    for name, value in model.named_parameters():
        if name == "position_scale":
            assert value.item() == pytest.approx(128**-0.5)
        elif value.dim() == 1:
            assert bool((value == (1 if name.endswith("norm.weight") else 0)).all()), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
    assert bool((model.embedding.weight[5] == 0).all())
    assert model.head.weight is model.embedding.weight


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"causal": True}, "an encoder needs causal=False"),
        ({"token_mixer": "mlgru", "positions": "none"}, "token_mixer 'mlgru' sees one direction"),
        ({"pooler": "median"}, "pooler 'median' is unknown"),
        ({"pooler_size": 0}, "pooler_size must be a whole number above 0 or null, got 0"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout 1.0 must be a number in \[0, 1\)"),
        ({"num_attention_heads": 5}, "num_heads 5 does not divide"),
        ({"rotary": True}, "unknown config key 'rotary'"),
    ],
)
def test_dials_of_which_no_encoder_is_built(values, message):
    sizes = {
        k: v for k, v in SIZES.items() if k != "num_heads" or "num_attention_heads" not in values
    }
    with pytest.raises(ValueError, match=message):
        MaskedLM(EncoderConfig(**{**sizes, **values}))


def test_bad_inputs():
    model, ids = build(MaskedLM), some_ids()
    labels = some_labels(ids)
    with pytest.raises(ValueError, match="25 tokens is longer than max_position_embeddings 24"):
        model(some_ids(1, 25))
    with pytest.raises(ValueError, match="token id 64 is out of range: the vocabulary has 64"):
        model(torch.tensor([[5, 64]]))
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 16\), expected \(2, 17\)"):
        model(ids, attention_mask=torch.ones(2, 16))
    for bad in (64, -1):
        labels[1, 3] = bad
        with pytest.raises(ValueError, match=f"label {bad} is out of range: the vocabulary has 64"):
            model.loss(ids, labels)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 16\), expected \(2, 17\)"):
        model.loss(ids, labels[:, :16])
    with pytest.raises(ValueError, match=r"labels must be whole numbers, got torch.float32"):
        model(ids, labels=labels.float())


@pytest.mark.parametrize("name", ["ultrafastbert", "ternary trees"])
def test_a_logit_that_is_not_a_number_is_an_error(name):
    model = build(MaskedLM, name)
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"(?i)nan"):
        model(torch.tensor([[3, 7]]))


# -- the bare encoder -----------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_and_embeddings():
    model, ids = build(Encoder), some_ids()
    mask = torch.ones(2, 17)
    mask[1, 9:] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    embeddings = model.embed(ids, mask)
    assert torch.allclose(embeddings[1], output.last_hidden_state[1, :9].mean(0), atol=1e-6)
    assert torch.allclose(embeddings[1:], model.embed(ids[1:, :9]), atol=1e-5)
    states = model(inputs_embeds=model.embedding(ids), attention_mask=mask, return_dict=False)
    assert torch.equal(states[0], output.last_hidden_state)
