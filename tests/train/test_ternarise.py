"""`nomatmul ternarise` from a teacher to a packed model: taught, resumed, handed on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from many_jobs import start_many
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from train_jobs import SIGKILL_STATUS, losses, signal_when, start, steps_on_disk
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nomatmul
from nomatmul import cli
from nomatmul.convert import pack
from nomatmul.convert.export import export
from nomatmul.formats.chat_template import DEFAULT_TEMPLATE
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.special_tokens import CHAT_TOKENS
from nomatmul.formats.tokenizer import load_tokenizer
from nomatmul.models import CausalLM
from nomatmul.train import TrainConfig, ternary_values
from nomatmul.train.metrics import read_metrics
from nomatmul.train.ternarise import config_of

SIZES = {
    "vocab_size": 304,  # more rows than the tokenizer has entries, as Qwen3 has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "bos_token_id": 0,  # with which no text begins: its tokenizer puts none in front
    "eos_token_id": 2,
}
RUN = ("--scale-group", "32", "--steps", "10", "--sequence-length", "16", "--batch-size", "4")
SET = ("checkpoint_interval=3", "log_interval=2", "eval_interval=5", "eval_tokens=200",
       "sample_interval=0", "diagnostics_interval=5", "checkpoint_seconds=0", "loss_chunks=2",
       "learning_rate=0.003", "micro_batch_size=2")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A random model as transformers writes it, with a tokenizer and a chat template."""
    at = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(at)
    shutil.copy(finished / "model/tokenizer.json", at)
    (at / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return at


def command(teacher: Path, text: Path, out: Path, *more: str) -> list[str]:
    settings = [word for setting in SET for word in ("--set", setting)]
    place = ["--data", str(text), "--out", str(out), "--device", "cpu", "--workers", "1", "--quiet"]
    return ["ternarise", str(teacher), *place, *RUN, *settings, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text_file: Path) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(command(teacher, text_file, out)) == 0
    return out


def the_config(teacher: Path) -> TrainConfig:
    """What `command` trains."""
    checkpoint = open_checkpoint(teacher)
    overrides = (*SET, "steps=10")
    return config_of(checkpoint.config, 32, sequence_length=16, batch_size=4, overrides=overrides)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model/model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_it_learns_from_its_teacher(whole: Path, teacher: Path) -> None:
    column = [row["distill_loss"] for row in read_metrics(whole) if "distill_loss" in row]
    assert len(column) == 10
    assert 0 < column[-1] < 0.9 * column[0]
    facts = json.loads((whole / "run.json").read_text())
    assert facts["config"]["teacher_share"] == 1
    assert facts["start"]["path"] == str(teacher)
    assert facts["teacher"]["sha256"]


def test_the_model_holds_values_and_float16_scales(whole: Path, teacher: Path) -> None:
    found = weights(whole)
    scales = {name for name in found if name.endswith(".scale")}
    assert len(scales) == 2 * 6
    for name in scales:
        assert torch.equal(found[name], found[name].half().float())
        assert found[name.replace(".scale", ".values")].dtype == torch.int8
    assert found["embedding.weight"].shape == (304, 64)
    config = open_checkpoint(whole / "model").config
    assert (config.bos_token_id, config.end_token_ids) == (None, (2,))  # as the teacher is used
    template = "chat_template.jinja"
    assert (whole / "model" / template).read_text() == (teacher / template).read_text()


def test_it_is_packed_and_the_engine_runs_it(whole: Path, tmp_path: Path) -> None:
    result = pack(whole, tmp_path / "packed", embedding="f32")
    assert result.scale_group == 32
    ids = np.random.default_rng(1).integers(0, 300, 40).tolist()
    ours = nomatmul.load(tmp_path / "packed", kv="f32").logits(ids)
    with torch.no_grad():
        expected = CausalLM.from_pretrained(whole / "model").eval()(torch.tensor([ids])).logits[0]
    # the engine rounds activations to int8 in each group, torch does not
    assert (ours - expected.numpy()).std() < 0.05 * float(expected.std())
    assert (ours.argmax(-1) == expected.numpy().argmax(-1)).mean() > 0.8


@torch.no_grad()
def test_transformers_loads_its_export(whole: Path, tmp_path: Path) -> None:
    result = export(whole, tmp_path / "unpacked", to="unpacked")
    assert (result.family, result.scale_change) == ("llama", 0.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = CausalLM.from_pretrained(whole / "model").eval()(ids).logits
    torch.testing.assert_close(theirs.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_killed_and_continued(whole: Path, teacher: Path, text_file: Path, tmp_path: Path) -> None:
    out, choose, kills = tmp_path / "run", random.Random(1), 0
    for _ in range(2):
        wanted = steps_on_disk(out) + choose.randint(2, 5)
        status = signal_when(
            start(the_config(teacher), text_file, out, start=str(teacher), teacher=str(teacher)),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        kills += status == SIGKILL_STATUS
    assert kills
    assert cli.main(command(teacher, text_file, out)) == 0
    assert losses(out) == losses(whole)
    assert same(out, whole)


def _command(words: list[str]) -> None:
    sys.exit(cli.main(words))


def test_two_ranks_hand_on_what_one_does(
    whole: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    job = start_many(2, tmp_path / "run", _command, command(teacher, text_file, tmp_path / "run"))
    assert job.join() == [0, 0], job.everything()
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-3)
    one, two = weights(whole), weights(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all(torch.equal(two[n], two[n].half().float()) for n in two if n.endswith(".scale"))


def test_the_same_command_again_changes_nothing(
    whole: Path, teacher: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert cli.main(command(teacher, text_file, out, "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["status"], answer["step"]) == ("finished", 10)
    assert answer["model"] == str(out / "model")
    assert same(out, whole)


def test_conversations_leave_their_template(teacher: Path, tmp_path: Path) -> None:
    """A teacher that only has the tokens gets the template that it was trained with."""
    plain = tmp_path / "plain"
    shutil.copytree(teacher, plain)
    (plain / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(plain)
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    tokenizer.save(str(plain / "tokenizer.json"))
    says = [{"role": who, "content": "the old bridge"} for who in ("user", "assistant")]
    data = tmp_path / "talk.jsonl"
    data.write_text((json.dumps({"messages": says}) + "\n") * 100)
    assert cli.main(command(plain, data, tmp_path / "run", "--steps", "1")) == 0
    model = tmp_path / "run" / "model"
    assert CausalLM.from_pretrained(model).config.stored_linears
    assert (model / "chat_template.jinja").read_text("utf-8") == DEFAULT_TEMPLATE
    ends = json.loads((model / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert ends[0] == tokenizer.token_to_id(CHAT_TOKENS[-1])


def test_values_are_there_whole_or_not_at_all(
    whole: Path, teacher: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A full disk or SIGTERM leaves the trained floats, of which the same command makes them."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    def terminated(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    words = command(teacher, text_file, out)
    faults = (full, 1, f"error: cannot write {out}/model: I/O error: No space"), (
        terminated, 0, "stopped at step 10; the same command continues"
    )  # fmt: skip
    for fault, status, message in faults:
        with monkeypatch.context() as patch:
            patch.setattr(ternary_values, "save_tokenizer", fault)
            assert cli.main(words) == status
        assert message in capsys.readouterr().err
        assert not CausalLM.from_pretrained(out / "model").config.stored_linears
        assert not list(out.glob(".model*"))
    assert cli.main(words) == 0
    assert same(out, whole)


def test_another_teacher_does_not_continue_it(
    whole: Path, teacher: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(other)
    assert cli.main(command(other, text_file, whole)) == 1
    assert "holds a run with another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--scale-group", "128"), "scale-group 128 does not divide the model's widths 64, 96"),
        (("--total-tokens", "64"), "both say how long"),
        (("--sequence-length", "0"), "sequence-length 0 must be at least 1"),
        (("--sequence-length", "65"), "max_position_embeddings 64"),
        (("--batch-size", "0"), "batch-size 0 must be at least 1"),
        (("--set", "model.num_layers=1"), "the model's shape is the teacher's"),
        (("--set", "teacher_share=0"), "teacher_share"),
        (("--set", "teacher_share=1.5"), "teacher_share 1.5 must be at most 1"),
        (("--set", "temperature=0"), "temperature 0.0 must be from 0.01"),
        (("--data", "/nowhere.txt"), "/nowhere.txt"),
    ],
)
def test_mistakes_cost_no_work(
    teacher: Path, text_file: Path, tmp_path: Path, words: tuple[str, ...], match: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(command(teacher, text_file, tmp_path / "run", *words)) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lengths_and_rates(teacher: Path) -> None:
    shape = open_checkpoint(teacher).config
    config = config_of(shape, 32, total_tokens=1_000_000, batch_size=6)
    assert (config.sequence_length, config.batch_size, config.micro_batch_size) == (64, 6, 3)
    assert config.steps == -(-1_000_000 // (6 * 64))
    assert config.warmup_steps == round(0.05 * config.steps)
    assert config_of(shape, 32, overrides=["warmup_steps=7", "steps=100"]).warmup_steps == 7
    assert config_of(shape, 32, overrides=["steps=100"]).warmup_steps == 5
