"""`--start`: a run begins with the weights of a model; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from train_jobs import (
    SIGKILL_STATUS,
    losses,
    signal_when,
    start,
    steps_on_disk,
    tiny_config,
    train_here,
)

from nomatmul.formats.config import ModelConfig
from nomatmul.train import TrainConfig
from nomatmul.train.model import build_model


def larger(config: TrainConfig, rows: int = 8) -> TrainConfig:
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size + rows)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def begun(finished: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that begins where `finished` has ended."""
    out = tmp_path_factory.mktemp("start") / "run"
    train_here(tiny_config(steps=6), text_file, out, start=str(finished))
    return out


def test_the_first_weights_and_the_tokenizer_are_the_model_s(
    finished: Path, tmp_path: Path, text_file: Path
) -> None:
    """At a rate of nearly nothing one step leaves the weights where they were; other text would
    give another tokenizer."""
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text("utf-8").upper(), "utf-8")
    config = tiny_config(steps=1, learning_rate=1e-12, weight_decay=0.0)
    train_here(config, other, tmp_path / "run", start=str(finished))
    old = load_file(finished / "model/model.safetensors")
    new = load_file(tmp_path / "run/model/model.safetensors")
    assert old.keys() == new.keys()
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-9)
    files = [path / "model/tokenizer.json" for path in (finished, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_optimiser_and_step_are_new_and_run_json_names_the_model(
    begun: Path, finished: Path
) -> None:
    assert len(losses(begun)) == 6
    assert losses(begun)[0] != losses(finished)[0]
    facts = json.loads((begun / "run.json").read_text("utf-8"))["start"]
    assert facts["path"] == str(finished)
    assert len(facts["sha256"]) == 64


def test_a_larger_vocabulary_keeps_its_fresh_rows(
    finished: Path, tmp_path: Path, text_file: Path
) -> None:
    """Its tokenizer may have more tokens behind the old ones."""
    tokenizer = Tokenizer.from_file(str(finished / "model/tokenizer.json"))
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = larger(tiny_config(steps=1, learning_rate=1e-12, weight_decay=0.0))
    out = tmp_path / "run"
    words = {"start": str(finished), "tokenizer": str(tmp_path / "tokenizer.json")}
    train_here(config, text_file, out, **words)
    old = load_file(finished / "model/model.safetensors")
    new = load_file(out / "model/model.safetensors")
    torch.manual_seed(config.seed)
    fresh = build_model(config.model).state_dict()
    for name in ("embedding.weight", "head.weight"):
        size = len(old[name])
        torch.testing.assert_close(new[name][:size], old[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(new[name][size:], fresh[name][size:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "its model.hidden_size is 32, the run's 16"),
        ({"num_layers": 1}, "its model.num_layers is 2, the run's 1"),
        ({"use_lower_bound": False}, "its model.use_lower_bound is True, the run's False"),
        ({"vocab_size": 290}, "its vocabulary of 300 is larger than model.vocab_size 290"),
        (
            {"linear": "dense"},
            "its tensor layers.0.mixer.i_proj.norm.weight is 32, the run's missing",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_the_first_difference(
    finished: Path, tmp_path: Path, text_file: Path, changes: dict, message: str
) -> None:
    config = tiny_config()
    model = ModelConfig.from_dict(config.model.to_dict() | changes)
    with pytest.raises(ValueError, match=message):
        train_here(
            dataclasses.replace(config, model=model), text_file, tmp_path / "run",
            start=str(finished),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_tokens_with_other_ids_are_refused(finished: Path, tmp_path: Path, text_file: Path) -> None:
    words = json.loads((finished / "model/tokenizer.json").read_text("utf-8"))
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words), "utf-8")
    out = tmp_path / "run"
    given = str(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"has id \d+ in .*, and id \d+ in the run's"):
        train_here(tiny_config(), text_file, out, start=str(finished), tokenizer=given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        train_here(tiny_config(), text_file, out, start=str(tmp_path / "empty"))
    assert not out.exists()


def test_a_killed_run_goes_on_bit_for_bit_and_only_from_the_same_start(
    begun: Path, finished: Path, tmp_path: Path, text_file: Path
) -> None:
    config, out = tiny_config(steps=6, log_interval=1), tmp_path / "run"
    for wanted in (1, 4):  # before and after the first checkpoint
        status = signal_when(
            start(config, text_file, out, start=str(finished)),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        assert status in (0, SIGKILL_STATUS)
    with pytest.raises(ValueError, match=r"another config: start: .* -> none"):
        train_here(config, text_file, out)
    with pytest.raises(ValueError, match=r"another config: start: .* -> "):
        train_here(config, text_file, out, start=str(begun))
    assert train_here(config, text_file, out, start=str(finished)).status == "finished"
    assert losses(out) == losses(begun)
    left, right = (load_file(path / "model/model.safetensors") for path in (out, begun))
    assert all(torch.equal(left[name], right[name]) for name in left)
