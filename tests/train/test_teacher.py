"""A teacher: any causal language model, its logits made chunk by chunk, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from teachers import change_config, write_teacher
from transformers import AutoModelForCausalLM

from nomatmul.ops.loss import Taught, TeacherLogits
from nomatmul.ops.loss.taught import logits_of
from nomatmul.train.model import build_model
from nomatmul.train.plan import DevicePlan
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_files import find_teacher

from train_jobs import tiny_config  # isort: skip

CPU = DevicePlan(torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(finished: Path) -> Path:
    return finished / "model" / "tokenizer.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """In bfloat16, its vocabulary padded to 320 rows."""
    directory = tmp_path_factory.mktemp("llama")
    return write_teacher("llama", directory, tokenizer, rows=320, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "cohere", "granite"])
@torch.no_grad()
def test_logits_are_those_of_the_model(family: str, tmp_path: Path, tokenizer: Path) -> None:
    write_teacher(family, tmp_path, tokenizer, rows=320)
    teacher = Teacher.open(str(tmp_path), CPU)
    entries = teacher.files.entries
    assert teacher.vocab_size == entries < 320
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x_BT = torch.randint(0, entries, (3, 16))
    expected = model(input_ids=x_BT).logits.flatten(0, 1)[:, :entries]
    assert expected.std() > 0.01
    teacher.look(x_BT)
    for part in (slice(0, 48), slice(5, 9), slice(40, 100)):
        torch.testing.assert_close(
            teacher.logits(part).float(), expected[part], rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_a_model_of_ours_teaches(finished: Path) -> None:
    """From a run's directory; its head is ternary."""
    teacher = Teacher.open(str(finished), CPU)
    x_BT = torch.randint(0, teacher.vocab_size, (2, 16))
    teacher.look(x_BT)
    expected = teacher.model(input_ids=x_BT, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(teacher.logits(slice(3, 9)), expected[3:9])
    assert teacher.sha256 == find_teacher(str(finished / "model")).sha256


def test_hidden_states_stay_at_one_address_and_nothing_is_trained(llama: Path) -> None:
    teacher = Teacher.open(str(llama), CPU)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}  # of a bfloat16 file
    addresses, seen = set(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        teacher.look(torch.randint(0, teacher.vocab_size, (2, 8)))
        assert teacher._hidden_NE is not None
        addresses.add(teacher._hidden_NE.data_ptr())
        seen.append(teacher.logits(slice(0, 4)).clone())
    assert len(addresses) == 1
    assert not torch.equal(*seen)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_a_students_gradient_is_that_of_autograd(linear: str, llama: Path) -> None:
    """Through a whole model of ours, against its logits and torch's own losses."""
    config = tiny_config().model
    teacher = Teacher.open(str(llama), CPU, vocab_size=300)
    values = config.to_dict() | {"linear": linear}
    torch.manual_seed(0)
    model = build_model(type(config).from_dict(values))
    x_BT, y_BT = torch.randint(0, 290, (2, 2, 8))
    y_BT[0, 3] = -100
    teacher.look(x_BT)
    ours = model.loss(x_BT, y_BT, taught=teacher.taught(0.3, 2.0))
    mine = torch.autograd.grad(ours.total, list(model.parameters()))
    logits = model.head(model.hidden(x_BT)).flatten(0, 1)
    plain = F.cross_entropy(logits, y_BT.flatten())
    counted = y_BT.flatten() != -100
    log_t = torch.log_softmax(teacher.logits(slice(0, 16))[counted] / 2, -1)
    log_p = torch.log_softmax(logits[counted] / 2, -1)
    divergence = F.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
    torch.testing.assert_close(ours.loss, plain.detach())
    torch.testing.assert_close(ours.divergence, divergence.detach())
    theirs = torch.autograd.grad(0.7 * plain + 0.3 * 4 * divergence, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6, msg=name)


def test_a_teacher_that_nobody_holds_is_found_out() -> None:
    number = TeacherLogits(lambda part, _: torch.zeros(3, 4)).number
    with pytest.raises(AssertionError, match="no longer held"):
        logits_of(Taught(number, 0.5).teacher, slice(0, 3), torch.zeros(3, 4))


@pytest.mark.parametrize("family", ["bert", "headless"])
def test_an_encoder_is_no_teacher(family: str, tmp_path: Path, tokenizer: Path) -> None:
    """By its name, or else by looking at later tokens."""
    write_teacher(family, tmp_path, tokenizer, rows=320)
    if family == "headless":
        change_config(tmp_path, architectures=None)
    with pytest.raises(ValueError, match=r"teacher .* is an encoder or another kind of model"):
        Teacher.open(str(tmp_path), CPU)


def test_what_is_no_teacher_is_refused(tmp_path: Path, llama: Path) -> None:
    cases = {
        "nowhere": "nowhere does not exist",
        "owner/name": "owner/name does not exist; a model of the .* Hub is hf:owner/name",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            find_teacher(name)
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json.*save_pretrained"):
        find_teacher(str(copy))
    (copy / "config.json").write_text(json.dumps({"format": "nomatmul-packed"}))
    with pytest.raises(ValueError, match="is packed: give the directory of its training run"):
        find_teacher(str(copy))
    (copy / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"cannot read config\.json"):
        find_teacher(str(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "not-known"}))
    with pytest.raises(ValueError, match="not-known"):
        find_teacher(str(copy))


def test_a_head_with_too_few_rows_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_teacher("llama", tmp_path, tokenizer, rows=100)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ entries, its head only 100 rows"):
        find_teacher(str(tmp_path))


@pytest.mark.parametrize(
    "values",
    [{"num_attention_heads": 0}, {"vocab_size": "many"}, {"vocab_size": 350}, {"hidden_size": 4}],
    ids=lambda values: "-".join(map(str, *values.items())),
)
def test_sizes_that_cannot_be_are_refused_by_name(
    values: dict[str, object], tmp_path: Path, llama: Path
) -> None:
    """transformers meets them with errors of all kinds, or a table on the terminal."""
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    change_config(copy, **values)
    with pytest.raises(ValueError, match=f"teacher {copy}") as raised:
        Teacher.open(str(copy), CPU)
    assert "above report" not in str(raised.value)


@pytest.mark.parametrize("damage", ["missing", "nan", "cut"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path, llama: Path) -> None:
    """A tensor that is missing would be drawn at random."""
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    file, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    if damage == "missing":
        del weights[name]
    elif damage == "nan":
        weights[name][2, 3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"up_proj|incomplete|Safetensor|damaged|cut"):
        Teacher.open(str(copy), CPU)
