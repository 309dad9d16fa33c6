"""Training that changes on its way, on a CPU: the same fused operations, their steps in PyTorch."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.evaluate.rows import read_rows
from nomatmul.models import CausalLM, layers
from nomatmul.models.layers import BitLinear
from nomatmul.ops.bitlinear import absmax_quantize, root_mean_square, ternary_cache
from nomatmul.train.model import build_model
from nomatmul.train.plan import DevicePlan
from studies.compare.cell import CellTrainer, run_cell
from studies.recipes import page, run, switches
from studies.recipes.cells import Amount, build
from studies.recipes.change import Change, ChangedCell
from studies.recipes.dead_zone import DeadZone
from studies.recipes.distil import Teacher, distilled_loss
from studies.recipes.second import PARTS, one
from studies.recipes.trainer import ChangedTrainer, alive, wait_for


@pytest.fixture(scope="module")
def work(recipe_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(recipe_work, tmp_path_factory.mktemp("changes") / "work")


def cell(work: Path, rows: str = "rows.jsonl", **values: Any) -> ChangedCell:
    amount = Amount(tiny=True, seeds=(1,))
    entry = one(amount, "test", values.pop("variant", "run"), "label", **values)
    return build(entry, amount, work, work / rows)


@functools.cache
def ran(work: Path, change: Change) -> dict[str, Any]:
    """The row of a run."""
    rows = f"rows-{hash(change)}.jsonl"
    (row,) = run_cell(cell(work, rows, change=change), trainer_type=ChangedTrainer)
    return row


def weights(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_without_a_change_a_run_is_the_package_s_bit_for_bit(work: Path) -> None:
    """The same losses on the way, scores and weights."""
    results = []
    for kind in (CellTrainer, ChangedTrainer):
        with ternary_cache() as cache:
            trainer = kind(cell(work), cache, lambda text: None)
            row = trainer.run(1)
        results.append(
            (row["curve"][-1][1], row["loss"], row["bpb_novels"], weights(trainer.model))
        )
    (*plain, first), (*changed, second) = results
    assert plain == changed
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _rounded_inputs(x: Tensor, weight: Tensor, norm: Tensor, eps: float, **_: Any) -> Tensor:
    y = x / root_mean_square(x, eps) * norm
    q, unit = absmax_quantize(y)
    return F.linear(y + (q * unit - y).detach(), weight)


@pytest.mark.parametrize("same", [False, True])
def test_a_taught_student_has_the_gradient_of_the_mixed_targets(work: Path, same: bool) -> None:
    """The teacher of either kind; the value is the student's own cross-entropy."""
    torch.manual_seed(0)
    base = {} if same else {"base": "transformer_box"}
    config = cell(work, size="L", **base).train_config.model
    directory = work / f"teacher-{same}"
    master = build_model(config)
    master.save_pretrained(directory)
    student = build_model(cell(work).train_config.model)
    for model in (master, student):
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    master.save_pretrained(directory)
    x_BT, y_BT = torch.randint(8000, (2, 2, 32))
    with switches.fused_everywhere():
        teacher = Teacher(directory, DevicePlan(torch.device("cpu")))
        teacher.look(x_BT)
        loss, _ = distilled_loss(student, teacher, 0.25)(x_BT, y_BT)
        loss.backward()
    got = [p.grad for p in student.parameters()]  # None of lower bounds: one layer has none
    student.zero_grad()
    with torch.no_grad(), patch.object(layers, "bit_linear", _rounded_inputs):
        taught = torch.softmax(master(x_BT, logits_to_keep=0).logits.double(), -1).flatten(0, 1)
    logits = student.head(student.hidden(x_BT)).flatten(0, 1).double()
    mixed = 0.75 * F.one_hot(y_BT.flatten(), logits.shape[1]) + 0.25 * taught
    target = -(mixed * torch.log_softmax(logits, -1)).sum(-1).mean()
    target.backward()
    own = F.cross_entropy(logits, y_BT.flatten())
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    for a, parameter in zip(got, student.parameters(), strict=True):
        if a is not None:
            torch.testing.assert_close(a, parameter.grad, rtol=5e-3, atol=2e-5)


def test_full_precision_all_along_and_then_ternary(work: Path) -> None:
    """Shares of 0, a half and 1 are three different runs; their first losses tell the phases."""
    rows = [ran(work, Change(dense=share)) for share in (0.0, 0.5, 1.0)]
    ternary, half, dense = (row["held_out_curve"] for row in rows)
    assert half[0][1] == dense[0][1] != ternary[0][1]
    assert half[-1][1] != dense[-1][1]
    assert half[-1][1] != ternary[-1][1]
    assert rows[1]["change"] == {"dense": 0.5}
    assert 0 < rows[0]["stuck"] <= rows[0]["zero"] < 1


def test_the_dead_zone_counts_what_is_zero_at_every_look() -> None:
    model = build_model(cell(Path("work")).train_config.model)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    weight = model.layers[0].mixer.i_proj.weight.data
    zones = DeadZone(model)
    total = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, BitLinear))
    weight[:2] = 0
    zones.look()
    weight[1] = 1
    zones.look()
    rows = weight.shape[1] / total
    assert zones.row() == {
        "zero": round(rows, 5), "stuck": round(rows, 5), "flipped": round(rows, 5)
    }  # fmt: skip


def test_a_student_without_its_teacher_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = [c for c in map(_built, PARTS["distil"](Amount())) if c.change.needs]
    teachers = list(map(_built, PARTS["teachers"](Amount())))
    said: list[str] = []
    assert run.with_models(taught, said.append) == []
    assert "teacher-transformer-L-1" in said[0]
    assert run.with_models([*teachers, *taught], said.append) == [*teachers, *taught]
    monkeypatch.setattr("studies.recipes.trainer.GRACE", 0.0)
    monkeypatch.setattr("studies.recipes.trainer.PAUSE", 0.01)
    with pytest.raises(SystemExit, match="no process trains it"):
        wait_for(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    wait_for(tmp_path / "teacher")
    file = tmp_path / "file.pid"
    file.write_text(str(os.getpid()))
    assert alive(file)


def _built(entry: dict[str, Any]) -> ChangedCell:
    return build(entry, Amount(), Path("work"), Path("rows"))


def test_a_teacher_s_model_serves_the_student_after_it(work: Path) -> None:
    amount = Amount(tiny=True, seeds=(1,))
    chosen = {"mlgru-L", "S-same-0.5"}
    for entry in [*PARTS["teachers"](amount), *PARTS["distil"](amount)]:
        if entry["variant"] in chosen:
            cell = build(entry, amount, work, work / "taught.jsonl")
            run_cell(cell, trainer_type=ChangedTrainer)
    teacher, student = read_rows(work / "taught.jsonl")
    assert teacher["status"] == student["status"] == "ok"
    assert student["change"] == {"teacher": "teacher-mlgru-L-1", "weight": 0.5}
    assert student["loss"] != ran(work, Change())["loss"]
    assert CausalLM.from_pretrained(work / "models/teacher-mlgru-L-1").config.num_layers == 1
    assert alive(work / "models/teacher-mlgru-L-1.pid")


def test_the_tables_divide_runs_by_size_and_length() -> None:
    def row(section: str, variant: str, bits: float, **values: Any) -> dict[str, Any]:
        scores = {f"bpb_{text}": bits for text in page.TEXTS}
        return {
            "section": section, "variant": variant, "label": variant, "status": "ok", "seed": 1,
            "learning_rate": 0.01, "parameters": 8.5e6, "tokens": 4e7, "zero": 0.25, "lanes": 4,
            "tokens_per_second": 1000, "commit": "abc", "bpb_wikipedia-raw": bits, **scores,
            **values,
        }  # fmt: skip

    rows = [row("phases", "base", 1.6), row("optimiser", "muon-1", 1.5, parameters=8.51e6),
            row("longer", "S-dense-30", 1.4, tokens=8e7), row("pareto", "mlgru S", 1.5, tokens=8e7),
            row("teacher", "dense-mlgru-S", 1.3), row("recipe", "base", 1.7)]  # fmt: skip
    first = [line.split(" | ")[0].strip("| ") for line in page.second_table(rows)[2:]]
    assert first == ["muon-1", "base"]
    assert "-0.1000 (-6.25 %)" in page.second_table(rows)[2]
    assert "| 0.25 |" in page.second_table(rows)[2]
    assert [run["variant"] for run in page.others(rows)] == [
        "dense-mlgru-S", "S-dense-30", "mlgru S"
    ]  # fmt: skip
    assert page.others([row("pareto", "mlgru S", 1.5)]) == []
    printed = page.page(rows, {})
    assert "## Training that changes on its way" in printed
    assert "## Other sizes and lengths" in printed
