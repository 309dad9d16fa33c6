"""The recipe study: its cells, the rounding of the twin, a dry run in toy sizes, its tables."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nomatmul.evaluate.rows import read_rows
from nomatmul.train.model import build_model
from studies.compare.plan import identity
from studies.recipes import page, run, texts
from studies.recipes.plan import PARTS, Amount, plan
from studies.recipes.quantised import file_bytes, gptq, round_groups


def _cells(*parts: str) -> dict[str, Any]:
    cells = plan(Amount(), Path("work"), Path("rows"), list(parts or PARTS))
    return {f"{cell.section}-{cell.variant}": cell for cell in cells}


def test_names_are_unique_and_every_recipe_changes_what_its_name_says() -> None:
    every = plan(Amount(), Path("work"), Path("rows"), list(PARTS))
    cells = _cells()
    assert len(cells) == len(every)
    assert len({identity(cell) for cell in _cells("frame", "knobs").values()}) == len(
        _cells("frame", "knobs")
    )
    base = cells["recipe-base"].train_config
    assert cells["recipe-decay-0.1"].train_config.weight_decay == 0.1
    assert cells["recipe-raw"].train == ("work/train-raw-box",)
    half = cells["recipe-batch-half"].train_config
    assert half.tokens_per_step * 2 == base.tokens_per_step
    assert half.steps * half.tokens_per_step == pytest.approx(1220 * 32768, rel=1e-3)


def test_shapes_for_the_box_pack_to_at_most_12_megabytes() -> None:
    for cell in _cells("box12").values():
        model = cell.train_config.model
        weights = model.num_layers * (
            4 * model.hidden_size**2 + 3 * model.hidden_size * model.mlp_size
        )
        head = table = model.vocab_size * model.hidden_size
        assert (weights + head) / 5 + table < 11.7e6  # and 0.3 for tokenizer and card
        assert model.hidden_size % 160 == 0 or model.hidden_size % 32 == 0


def test_scaling_cells_have_20_tokens_a_parameter_and_controls_that_differ_in_text_alone() -> None:
    cells = _cells("enough", "enough-half", "enough-large")
    for cell in cells.values():
        model, config = cell.train_config.model, cell.train_config
        layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.mlp_size
        tokens = config.steps * config.tokens_per_step
        assert tokens / (model.num_layers * layer) == pytest.approx(20, rel=0.08)
    for side in ("mlgru", "twin"):
        whole, half = cells[f"enough-M-{side}"], cells[f"enough-M-{side}-half"]
        assert (whole.train, half.train) == (
            ("work/train-clean-small",),
            ("work/train-clean-small-half",),
        )
        assert whole.train_config.to_dict() | {"recipe": ""} == half.train_config.to_dict() | {
            "recipe": ""
        }
        assert cells[f"enough-M-{side}-again"].seeds == (2,)


def test_rounding_keeps_codes_and_the_largest_weight_of_each_group() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 64)
    for bits, group in ((8, 0), (4, 32)):
        rounded = round_groups(w, bits, group).unflatten(1, (-1, group or 64))
        grouped = w.unflatten(1, (-1, group or 64))
        step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((rounded - grouped).abs() <= step * 0.51).all()
        assert max(len(row.unique()) for row in rounded.flatten(0, 1)) <= 2**bits
    assert (round_groups(torch.zeros(2, 32), 4, 32) == 0).all()


def test_gptq_has_a_smaller_output_error_than_rounding() -> None:
    torch.manual_seed(0)
    w, mix = torch.randn(16, 64), torch.randn(64, 64)
    x = torch.randn(500, 64) @ mix  # inputs that depend on each other
    x[:, 5] = 0  # and one that is never seen
    calibrated = gptq(w, x.T @ x, 4, 32)
    plain = round_groups(w, 4, 32)
    assert (calibrated[:, 5] == 0).all()

    def error(q: torch.Tensor) -> float:
        return float((x @ (q - w).T).square().mean())

    assert error(calibrated) < 0.6 * error(plain)


def test_file_bytes_count_codes_scales_and_norms() -> None:
    (cell,) = [c for n, c in _cells("pareto").items() if n == "pareto-transformer-S"]
    model = build_model(cell.train_config.model)
    total = sum(p.numel() for p in model.parameters())
    table = 8192 * 256
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert file_bytes(model, "bf16") == 2 * total
    matrices = total - table - norms
    wanted = matrices // 2 + matrices // 32 * 2 + table + 2 * 8192 + 2 * norms
    assert file_bytes(model, "int4 groups of 32, GPTQ") == wanted


@pytest.fixture(scope="module")
def dry_run(recipe_work: Path, warm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two toy cells of the Pareto part."""
    root = tmp_path_factory.mktemp("dry-run")
    shutil.copytree(recipe_work, root / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        _run(root)
    return root


def _run(root: Path) -> None:
    words = ["all", "--tiny", "--devices", "cpu", "--work", str(root / "work"), "--out",
             str(root / "out"), "--parts", "pareto", "--commit", "abc", "--cells",
             "pareto-transformer-S", "pareto-mlgru-S"]  # fmt: skip
    args = run.parse(words)
    args.action(args)


def test_a_dry_run_trains_rounds_packs_and_goes_on(dry_run: Path) -> None:
    rows = read_rows(dry_run / "out/rows.jsonl")
    trained = {row["variant"] for row in rows if row["section"] == "pareto"}
    assert trained == {"transformer-S", "mlgru-S"}
    forms = {row["stage"]: row for row in rows if row["section"] == "quantised"}
    assert len(forms) == 6
    sizes = [forms[name]["file_bytes"] for name in ("bf16", "int8", "int4 groups of 128")]
    assert sizes == sorted(sizes, reverse=True)
    whole = next(row for row in rows if row["variant"] == "transformer-S")
    assert forms["bf16"]["bpb_novels"] == pytest.approx(whole["bpb_novels"], rel=1e-3)
    with tarfile.open(dry_run / "out/pareto-mlgru-S.tar.gz") as archive:
        assert "pareto-mlgru-S/model.safetensors" in archive.getnames()
    _run(dry_run)
    assert read_rows(dry_run / "out/rows.jsonl") == rows
    assert read_rows(dry_run / "work/rows.jsonl") == rows


def test_a_model_is_sent_once_and_where_there_is_room(tmp_path: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "model.tar.gz"
    out.mkdir()
    archive.write_bytes(b"x" * 100)
    full = [out / f"file-{number}" for number in range(run.FILES)]
    for file in full:
        file.touch()
    run.send(archive, out)
    assert not (out / archive.name).exists()
    full[0].unlink()
    run.send(archive, out)
    assert (out / archive.name).read_bytes() == archive.read_bytes()
    (out / archive.name).unlink()
    run.send(archive, out)
    assert not (out / archive.name).exists()
    large = tmp_path / "large.tar.gz"
    large.write_bytes(b"")
    os.truncate(large, run.FILE_LIMIT + 1)
    run.send(large, out)
    assert not (out / large.name).exists()


def test_cleaned_and_raw_texts_become_tokens_of_their_own(dry_run: Path) -> None:
    raw = (dry_run / "work/raw/novels-train.jsonl").read_text()
    clean = (dry_run / "work/clean/novels-train.jsonl").read_text()
    assert re.search("= Title =.*Two  spaces", raw)
    assert "Title\\nTwo spaces here." in clean
    assert (dry_run / "work/train-clean-small/index.json").is_file()


def test_a_command_without_texts_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `gather` first"):
        texts.documents(tmp_path, cleaned=True)


def _row(variant: str, seed: int, bits: float) -> dict[str, Any]:
    scores = {f"bpb_{text}": bits for text in page.TEXTS}
    return {
        "section": "recipe", "variant": variant, "label": variant, "status": "ok", "seed": seed,
        "learning_rate": 0.01, **scores, "bpb_wikipedia-raw": bits,
    }  # fmt: skip


def test_the_table_orders_recipes_and_judges_them_by_the_seeds() -> None:
    rows = [_row("base", 1, 2.0), _row("base", 2, 2.002), _row("worse", 1, 2.1),
            _row("better", 1, 1.9), _row("better", 2, 1.902)]  # fmt: skip
    lines = page.recipe_table(rows)[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["better", "base", "worse"]
    assert "-0.1000 (-5.00 %)" in lines[0]
    assert page.pooled([rows[:2], rows[3:]]) == pytest.approx(0.002**0.5 * 0.001**0.5, rel=1e-6)
    assert "| 0.0014 |" in lines[0]
    assert page.recipe_table([_row("other", 1, 1.0)]) == []


def test_a_cut_run_is_in_no_table() -> None:
    cut = {**_row("base", 1, 1.0), "status": "cut"}
    assert page.recipe_table([cut]) == []


def test_packed_models_take_their_place_by_size(dry_run: Path) -> None:
    rows = read_rows(dry_run / "out/rows.jsonl")
    packed = page.packed_bytes(dry_run / "out")
    assert set(packed) == {"pareto-mlgru-S"}
    lines = page.pareto_table(rows, packed)[2:]
    assert len(lines) == 7
    sizes = [float(line.split(" | ")[2]) for line in lines]
    assert sizes == sorted(sizes)
    assert "## Runs of the Pareto models" in page.page(rows, packed)


def test_the_tables_of_the_kept_rows_can_be_made_again(capsys):
    page.main(["--tiny"])
    printed = capsys.readouterr().out
    assert "## One change at a time" in printed
    assert "today's recipe" in printed
    with pytest.raises(SystemExit):
        page.main([])


def test_the_plot_is_made_of_the_rows_of_all_parts(tmp_path: Path) -> None:
    kept = sorted((page.ROOT / "benchmarks/results").glob("*-recipes*/rows.jsonl"))
    rows = [row for file in kept for row in read_rows(file)]
    changes = {label: percent for label, percent, _ in page.plotted(rows)}
    assert changes["Muon, the same rate"] == pytest.approx(0.49, abs=0.01)
    assert changes["30 % full precision, small gains"] == pytest.approx(-1.19, abs=0.01)
    assert "today's recipe" not in changes
    page.main([*map(str, kept), "--plot", str(tmp_path / "recipes.svg")])
    drawn = (tmp_path / "recipes.svg").read_text()
    assert "Transformer++, half of the text" in drawn
    assert "Muon, the same rate" in drawn
    assert len(drawn) < 200_000
