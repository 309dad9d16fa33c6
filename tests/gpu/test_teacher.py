"""Runs with a teacher on a GPU: in bfloat16, recorded as a graph, launched, and compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from teachers import write_teacher
from train_jobs import losses, make_text, tiny_config

from nomatmul.train import run
from nomatmul.train.metrics import read_metrics
from nomatmul.train.plan import pick_device, plan_device
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_files import find_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.train]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A small Transformer++ of ours."""
    out = tmp_path_factory.mktemp("own") / "run"
    config = tiny_config()
    model = dataclasses.replace(config.model, linear="dense", token_mixer="attention")
    config = dataclasses.replace(config, model=model, steps=20)
    run(config, [str(text)], out, workers=1, device="cuda", quiet=True)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, own: Path) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return write_teacher("llama", directory, own / "model/tokenizer.json", rows=320)


@pytest.mark.parametrize(
    ("kind", "compiled"), [("own", "graph"), ("llama", "graph"), ("own", "on")]
)
def test_students_learn_alike(
    kind: str, compiled: str, tmp_path: Path, text: Path, request: pytest.FixtureRequest
) -> None:
    teacher: Path = request.getfixturevalue(kind)
    model = dataclasses.replace(tiny_config().model, vocab_size=find_teacher(str(teacher)).entries)
    config = tiny_config(model=model, teacher_share=0.5, temperature=1.5, steps=12)
    for mode in ("off", compiled):
        run(
            dataclasses.replace(config, compile=mode), [str(text)], tmp_path / mode,
            workers=1, device="cuda", quiet=True, teacher=str(teacher),
        )  # fmt: skip
    plain, other = tmp_path / "off", tmp_path / compiled
    assert losses(other) == pytest.approx(losses(plain), rel=2e-2)
    distances = [row["distill_loss"] for row in read_metrics(other) if "distill_loss" in row]
    assert sum(distances[-4:]) / 4 < distances[0]


def test_a_teacher_of_transformers_computes_in_bfloat16(llama: Path) -> None:
    teacher = Teacher.open(str(llama), plan_device(pick_device("cuda")))
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    x_BT = torch.randint(0, 290, (2, 16), device="cuda")
    teacher.look(x_BT)
    wide = Teacher.open(str(llama), plan_device(torch.device("cpu")))
    wide.look(x_BT.cpu())
    ours, exact = (t.logits(slice(0, 32)).float().cpu() for t in (teacher, wide))
    assert (ours - exact).norm() / exact.norm() < 3e-2
