"""Encoders and fast feedforward layers through the whole trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from many_jobs import train_any
from train_jobs import held_out, losses, tiny_config, train_here

from nomatmul.formats.config import ModelConfig
from nomatmul.models import MaskedLM
from nomatmul.models.channels.trees import balance_loss
from nomatmul.train import TrainConfig
from nomatmul.train.batches import held_out_masked
from nomatmul.train.fff_training import counting, tree_layers, usage_row
from nomatmul.train.masking import Masking
from nomatmul.train.metrics import read_metrics
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import Ranks
from nomatmul.train.tokens import open_stream

CPU = DevicePlan(torch.device("cpu"))
TREES: dict[str, Any] = {
    "channel_mixer": "fff", "fff_trees": 2, "fff_depth": 2, "fff_bias": True,
}  # fmt: skip


def encoder_config(model: dict[str, Any] | None = None, **changes: object) -> TrainConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 200, "hidden_size": 32, "num_layers": 2, "intermediate_size": 64,
        "num_heads": 2, "token_mixer": "attention", "linear": "dense", "channel_mixer": "ffn",
        "causal": False, "norm": "layer", "positions": "sinusoidal", "embedding_norm": True,
        "tie_embeddings": True, "max_position_embeddings": 16,
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": ModelConfig(**(sizes | (model or {}))), "schedule": "triangle", "warmup_steps": 0,
        "clip_norm": 0.5, "batch_ramp": 0.4, "eval_tokens": 320,
    }  # fmt: skip
    return tiny_config(**(values | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "run"
    config = encoder_config(TREES, fff_balance=0.01, fff_route_gradient=True)
    train_here(config, text_file, out)
    return out


def test_the_masked_loss_falls(tmp_path: Path, text_file: Path) -> None:
    config = encoder_config(steps=60, batch_size=8, micro_batch_size=4, checkpoint_interval=0)
    train_here(config, text_file, tmp_path / "run")
    column = losses(tmp_path / "run")
    assert sum(column[-5:]) / 5 < column[0] - 1.0
    rows = [row for row in read_metrics(tmp_path / "run") if "valid_loss" in row]
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    assert rows[-1]["valid_accuracy"] > rows[0]["valid_accuracy"]


def test_held_out_scores_are_those_of_the_exported_model(finished: Path) -> None:
    row = [row for row in read_metrics(finished) if "valid_loss" in row][-1]
    stream = open_stream(finished / "tokens/train")
    held = stream.part(len(stream) - max(int(len(stream) * 0.05), 17), len(stream))
    model = MaskedLM.from_pretrained(finished / "model").eval()
    mask = stream.tokenizer.token_to_id("[MASK]")
    masking = Masking(4, mask, stream.tokenizer.get_vocab_size(), seed=0)
    nats, right, count = 0.0, 0, 0
    for x_BT, y_BT, _ in held_out_masked(held, 16, 1, 320, masking, CPU.device):
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=x_BT).logits[0].double(), -1)
        for place in range(16):
            if (want := int(y_BT[0, place])) != -100:
                nats -= float(log_p[place, want])
                right += int(log_p[place].argmax()) == want
                count += 1
    assert row["valid_tokens"] == count == 20 * 4
    assert row["valid_loss"] == pytest.approx(nats / count, rel=1e-4)
    assert row["valid_accuracy"] == pytest.approx(right / count)
    assert row["valid_perplexity"] == pytest.approx(math.exp(row["valid_loss"]))


def test_reports_of_trees(finished: Path) -> None:
    rows = read_metrics(finished)
    train = [row for row in rows if "loss" in row]
    # two layers at weight 0.01; balanced nodes give 1, one-sided ones at most 2
    assert all(0.02 <= row["auxiliary_loss"] <= 0.04 for row in train)
    usage = [row for row in rows if "fff_dead" in row]
    assert [row["step"] for row in usage] == [6, 12]
    for row in usage:
        assert 0 <= row["fff_dead"] < 1
        assert 0 < row["fff_entropy"] <= 1
        assert row["fff_tokens"] == 320
        assert set(row["fff_layers"]) == {"layers.0.channel", "layers.1.channel"}


def test_the_batch_ramp_reads_fewer_samples(finished: Path) -> None:
    """Steps 0 to 4 lie in the first 40 % of 12: of them 3 have one micro-batch of 2, 2 have two."""
    state = json.loads((finished / "checkpoints/step-00000012/state.json").read_text())
    assert state["samples"] == 3 * 2 + 9 * 4
    last = [row for row in read_metrics(finished) if "loss" in row][-1]
    assert last["tokens"] == state["samples"] * 16


@pytest.mark.parametrize("at", [3, 9])
def test_a_resumed_run_has_the_same_losses(
    finished: Path, tmp_path: Path, text_file: Path, at: int
) -> None:
    """From a checkpoint inside the ramp and from one behind it."""
    config = encoder_config(TREES, fff_balance=0.01, fff_route_gradient=True)
    out = tmp_path / "run"
    train_here(dataclasses.replace(config, checkpoint_keep=9), text_file, out)
    for path in out.glob("checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > at:
            shutil.rmtree(path)
    (out / "checkpoints/latest").write_text(f"step-{at:08d}")
    train_here(config, text_file, out)
    assert losses(out) == losses(finished)
    assert held_out(out) == held_out(finished)


def test_two_ranks_train_what_one_trains(tmp_path: Path, text_file: Path) -> None:
    config = encoder_config(TREES, micro_batch_size=1, steps=4, fff_balance=0.01, eval_interval=2)
    # one rank takes the ramp in smaller steps: without it the batches are the same
    config = dataclasses.replace(config, batch_ramp=0.0)
    train_here(config, text_file, tmp_path / "one")
    train_any(2, config, text_file, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    rows = [
        [row for row in read_metrics(tmp_path / name) if "valid_loss" in row or "fff_dead" in row]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows, strict=True):
        assert b.get("valid_loss", 0.0) == pytest.approx(a.get("valid_loss", 0.0), rel=1e-3)
        assert b.get("fff_tokens") == a.get("fff_tokens")


def test_the_auxiliary_loss_is_the_layers_own() -> None:
    config = encoder_config(TREES, fff_balance=0.5)
    torch.manual_seed(0)
    model = build_model(config.model)
    loss = build_loss(model, config, CPU)
    x_BT = torch.randint(10, 190, (2, 16))
    y_BT = torch.full_like(x_BT, -100)
    y_BT[:, :4] = x_BT[:, :4]
    inputs = {}
    for name, layer in tree_layers(model).items():
        layer.register_forward_hook(lambda _, args, out, name=name: inputs.update({name: args[0]}))
    _, _, auxiliary = loss(x_BT, y_BT)
    expected = 0.0
    for name, layer in tree_layers(model).items():
        _, logits, nodes = layer.walk_and_sum(inputs[name].flatten(0, 1))
        expected += 0.5 * balance_loss(logits, nodes, layer.w_in.shape[0]).item()
    assert auxiliary.item() == pytest.approx(expected, rel=1e-6)
    auxiliary.backward()
    assert model.layers[0].channel.w_in.grad.abs().sum() > 0


def test_dead_nodes_are_counted() -> None:
    """A bias that sends everybody left leaves 1 + ... of each tree's 7 nodes with visitors."""
    config = encoder_config(TREES)
    model = build_model(config.model).eval()
    for layer in tree_layers(model).values():
        torch.nn.init.constant_(layer.bias, -100.0)
    with counting(model), torch.no_grad():
        model(input_ids=torch.randint(0, 200, (3, 16)))
        row = usage_row(model, Ranks.alone())
    assert row["fff_dead"] == pytest.approx(4 / 7)
    assert row["fff_entropy"] == 0
    assert row["fff_tokens"] == 48
    assert all(layer.visits is None for layer in tree_layers(model).values())
    assert usage_row(build_model(encoder_config().model), Ranks.alone()) == {}


def test_biases_and_norms_are_not_decayed() -> None:
    config = encoder_config(TREES)
    model = build_model(config.model)
    groups = build_optimizer(model, config, CPU).param_groups
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in plain}
    assert all("norm" in name or "bias" in name or "scale" in name for name in names)
    assert "layers.0.channel.bias" in names
    assert "layers.0.channel.w_in" not in names


def test_a_causal_model_with_trees_trains(tmp_path: Path, text_file: Path) -> None:
    model = dataclasses.replace(
        tiny_config().model, channel_mixer="fff", fff_trees=2, fff_depth=2, activation="silu"
    )
    config = tiny_config(model=model, fff_balance=0.01, steps=20)
    train_here(config, text_file, tmp_path / "run")
    column = losses(tmp_path / "run")
    assert column[-1] < column[0] - 0.3
    assert [row for row in read_metrics(tmp_path / "run") if "fff_dead" in row]


def test_an_encoder_needs_a_mask_token(tmp_path: Path, text_file: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"a": 0, "[SEP]": 1}, [])).save(str(path))
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        train_here(encoder_config(), text_file, tmp_path / "run", tokenizer=str(path))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_file_serves_as_tokenizer(tmp_path: Path, text_file: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "old", "##s", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = encoder_config(steps=1)
    train_here(config, text_file, tmp_path / "run", tokenizer=str(tmp_path / "vocab.txt"))
    stream = open_stream(tmp_path / "run/tokens/train")
    assert stream.read(0, 1).tolist() == [2]
    assert stream.tokenizer.encode("The OLDS").tokens == ["[CLS]", "the", "old", "##s", "[SEP]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "the"]) + "\n")
    with pytest.raises(ValueError, match="names an entry twice: 11 lines, 10 entries"):
        train_here(config, text_file, tmp_path / "2", tokenizer=str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("the\n")
    with pytest.raises(ValueError, match=r"it lacks \[PAD\]"):
        train_here(config, text_file, tmp_path / "2", tokenizer=str(tmp_path / "vocab.txt"))
