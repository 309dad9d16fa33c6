"""What the trainer computes: losses, bits per byte, guards, equal ways to the same step."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_jobs import held_out, losses, tiny_config, train_here

from nomatmul.formats.architecture import architecture_of
from nomatmul.models import CausalLM
from nomatmul.train import TrainArgs, TrainConfig, apply_overrides, main
from nomatmul.train.checkpoints import CheckpointError, Checkpoints, Progress
from nomatmul.train.evaluation import Evaluator
from nomatmul.train.loop import Loop
from nomatmul.train.manifest import find_fault
from nomatmul.train.metrics import MetricsLog, read_metrics
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer
from nomatmul.train.plan import DevicePlan, plan_device
from nomatmul.train.step_log import NonFiniteError
from nomatmul.train.tokens import open_stream

CPU = DevicePlan(torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train_here(tiny_config(sample_interval=6, sample_tokens=4), text_file, out)
    return out


def first_losses(config: TrainConfig, text: Path, out: Path) -> list[float]:
    train_here(dataclasses.replace(config, steps=3, schedule="constant"), text, out)
    return losses(out)


def test_accumulation_chunks_and_checkpointing_give_the_same_step(
    tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    plain = first_losses(dataclasses.replace(config, micro_batch_size=4), text_file, tmp_path / "0")
    for number, changes in enumerate(
        [
            {"micro_batch_size": 1},
            {"micro_batch_size": 4, "loss_chunks": 4},
            {"micro_batch_size": 4, "recompute": "block"},
            {"micro_batch_size": 4, "recompute": "mlp"},
        ],
        1,
    ):
        other = dataclasses.replace(config, **changes)
        assert first_losses(other, text_file, tmp_path / str(number)) == pytest.approx(
            plain, abs=2e-3
        )


def test_transformer_twin_trains(tmp_path: Path, text_file: Path, config: TrainConfig) -> None:
    model = dataclasses.replace(config.model, token_mixer="attention", linear="dense", num_heads=2)
    config = dataclasses.replace(config, model=model, sample_interval=12, sample_tokens=4)
    train_here(config, text_file, tmp_path / "run")
    column = losses(tmp_path / "run")
    assert column[-1] < column[0] - 0.3
    assert not [row for row in read_metrics(tmp_path / "run") if "flip_rate" in row]


@pytest.mark.parametrize(
    "changes",
    [
        ["linear_norm=sub", "split_gate=on", "glu_activation=relu2", "head_linear=dense"],
        ["linear_norm=none", "scale_group=32", "embedding_linear=ternary", "qk_norm=on"],
    ],
    ids=["norms in front of outputs", "scales of groups"],
)
def test_forms_of_published_transformers_train(
    tmp_path: Path, text_file: Path, config: TrainConfig, changes: list[str]
) -> None:
    dials = ["token_mixer=attention", "num_heads=2", "num_kv_heads=1", *changes]
    config = apply_overrides(config, [f"model.{dial}" for dial in dials])
    assert train_here(config, text_file, tmp_path / "run").status == "finished"
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3
    model = CausalLM.from_pretrained(tmp_path / "run" / "model")
    assert architecture_of(model.model_config) == architecture_of(config.model)
    assert not model.config.stored_linears


def test_held_out_loss_is_that_of_the_exported_model(finished: Path, config: TrainConfig) -> None:
    """Against the sum of log-probabilities, window by window, and bytes counted from the text."""
    stream = open_stream(finished / "tokens/train")
    held = stream.part(len(stream) - max(int(len(stream) * 0.05), 17), len(stream))
    model = CausalLM.from_pretrained(finished / "model").eval()
    ids = held.read(0, 201).astype(int).tolist()
    total = 0.0
    for start in range(0, 200, config.sequence_length):
        window = ids[start : start + config.sequence_length + 1]
        total -= model.token_logprobs(window).sum()
    row = [row for row in read_metrics(finished) if "valid_loss" in row][-1]
    assert row["valid_tokens"] == 200
    assert row["valid_loss"] == pytest.approx(total / 200, rel=1e-4)
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert row["valid_bytes"] == len(text.encode())
    bits = total / math.log(2) / row["valid_bytes"]
    assert row["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_a_held_out_file_is_used_whole(
    tmp_path: Path, text_file: Path, config: TrainConfig
) -> None:
    valid = tmp_path / "valid.txt"
    valid.write_text("the old stone bridge waits for light.\n" * 3)
    config = dataclasses.replace(config, steps=1, eval_tokens=10_000)
    result = train_here(config, text_file, tmp_path / "run", valid=[str(valid)])
    row = next(row for row in read_metrics(tmp_path / "run") if "valid_loss" in row)
    assert row["valid_bytes"] == valid.stat().st_size
    assert result.valid_loss == row["valid_loss"]


def test_reports(finished: Path, config: TrainConfig) -> None:
    rows = read_metrics(finished)
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert all(row["grad_norm"] > 0 for row in train)
    assert train[-1]["tokens"] == 12 * 4 * 16
    assert [row["step"] for row in rows if "valid_loss" in row] == [6, 12]
    diagnostics = [row for row in rows if "flip_rate" in row]
    assert [row["step"] for row in diagnostics] == [6, 12]
    for row in diagnostics:
        shares = [row["ternary_minus"], row["ternary_zero"], row["ternary_plus"]]
        assert sum(shares) == pytest.approx(1)
        assert 0.2 < shares[1] < 0.5
        assert 0 < row["flip_rate"] < 0.5
        assert row["activation_max"] > 0
        assert "layers.1.mixer.i_proj" in row["layers"]
    assert (finished / "samples.txt").read_text().count("--- step") == 2
    assert list((finished / "tensorboard").glob("events*"))


def test_the_exported_model_and_the_checkpoint_are_ordinary_directories(finished: Path) -> None:
    for directory in (finished / "model", finished / "checkpoints/step-00000012"):
        model = CausalLM.from_pretrained(directory)
        assert model.tokenizer is not None
        assert model.config.eos_token_id == model.config.bos_token_id == 0
    assert find_fault(finished / "checkpoints/step-00000012") is None


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, text_file: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.take_step

    def poisoned(self: Loop, *arguments: Any) -> Any:
        if self.step == 7:
            with torch.no_grad():
                self.model.final_norm.weight[3] = math.nan
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "take_step", poisoned)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"step 8: loss nan, .*step-00000006\. Try a lower"):
        train_here(config, text_file, out)
    assert sorted(path.name for path in out.glob("checkpoints/step-*"))[-1] == "step-00000006"
    assert find_fault(out / "checkpoints/step-00000006") is None
    assert len(losses(out)) == 7
    monkeypatch.undo()
    assert train_here(config, text_file, out).status == "finished"


def test_a_model_with_nan_is_never_saved(tmp_path: Path, config: TrainConfig) -> None:
    model = build_model(config.model)
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"weight head.weight is not finite at step 3"):
        checkpoints.save(model, build_optimizer(model, config, CPU), None, config, Progress(3))
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("room", [1_000, 100_000, 200_000])
def test_a_full_disk_leaves_the_previous_checkpoint_intact(
    tmp_path: Path, finished: Path, config: TrainConfig, room: int
) -> None:
    """Files may not grow beyond `room` bytes: the system's own refusal, in each of the files."""
    model = build_model(config.model)
    optimizer = build_optimizer(model, config, CPU)
    tokenizer = open_stream(finished / "tokens/train").tokenizer
    checkpoints = Checkpoints(tmp_path, 2)
    good = checkpoints.save(model, optimizer, tokenizer, config, Progress(3))
    assert max(path.stat().st_size for path in good.iterdir()) > 200_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write checkpoint .*step-00000003 is intact"
        ):
            checkpoints.save(model, optimizer, tokenizer, config, Progress(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_fault(good) is None
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["latest", good.name]


def test_a_full_disk_stops_the_run_with_one_error(
    tmp_path: Path, text_file: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nomatmul.train.checkpoints.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train_here(config, text_file, tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_time_limit_ends_the_run_with_the_rate_at_zero(
    tmp_path: Path, text_file: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances one second a step."""
    config = dataclasses.replace(config, steps=10_000, time_limit=10.0, schedule="linear")
    monkeypatch.setattr("nomatmul.train.loop.Clock.elapsed", lambda self: self.before + steps[0])
    steps, step = [0.0], Loop.take_step

    def ticking(self: Loop, *arguments: Any) -> Any:
        try:
            return step(self, *arguments)
        finally:
            steps[0] += 1

    monkeypatch.setattr(Loop, "take_step", ticking)
    result = train_here(config, text_file, tmp_path / "run")
    assert (result.status, result.step, result.elapsed) == ("finished", 10, 10.0)
    assert [step for step, _ in held_out(tmp_path / "run")] == [6, 10]
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rates[-1] == pytest.approx(1e-3)
    state = json.loads((tmp_path / "run/checkpoints/step-00000010/state.json").read_text())
    assert state["elapsed"] == 10.0


def test_a_finished_run_reports_its_score_again(finished: Path, text_file: Path) -> None:
    again = train_here(tiny_config(sample_interval=6, sample_tokens=4), text_file, finished)
    row = [row for row in read_metrics(finished) if "valid_loss" in row][-1]
    assert (again.valid_loss, again.valid_bits_per_byte) == (
        row["valid_loss"],
        row["valid_bits_per_byte"],
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damage_of_any_file_is_found(tmp_path: Path, finished: Path, damage: str) -> None:
    whole = finished / "checkpoints/step-00000012"
    for number, name in enumerate(sorted(path.name for path in whole.iterdir())):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "lose":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
        assert find_fault(copy) is not None, name


def test_weight_decay_is_for_matrices(config: TrainConfig) -> None:
    model = build_model(config.model)
    optimizer = build_optimizer(model, config, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert "embedding.weight" in decayed
    assert "layers.0.mixer.i_proj.weight" in decayed
    assert {"lower_bounds", "final_norm.weight", "layers.0.mixer.i_proj.norm.weight"} <= plain


def test_bfloat16_is_close_to_float32(text_file: Path, config: TrainConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config.model)
    x_BT = torch.randint(0, 300, (2, 16))
    exact, _ = build_loss(model, config, CPU)(x_BT, x_BT)
    low, _ = build_loss(model, config, plan_device(CPU.device, "bfloat16"))(x_BT, x_BT)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=0.02)


def test_evaluation_does_not_depend_on_the_batch_size(finished: Path, config: TrainConfig) -> None:
    stream = open_stream(finished / "tokens/train").part(0, 150)
    model = build_model(config.model)
    results = []
    for rows in (1, 2, 4):
        sized = dataclasses.replace(config, micro_batch_size=rows)
        results.append(Evaluator(stream, sized, CPU).evaluate(build_loss(model, sized, CPU)))
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 3, rel=1e-4)
    assert {r.tokens for r in results} == {149}


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 1.0}, "train")
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_samples_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    for first, texts in ((0, {2: "one", 4: "zwölf\r\n\nlines", 6: "lost"}), (4, {6: "again"})):
        log = MetricsLog(tmp_path, first)
        for step, text in texts.items():
            log.write_text(text, step)
        log.close()
    wanted = "--- step 2 ---\none\n--- step 4 ---\nzwölf\r\n\nlines\n--- step 6 ---\nagain\n"
    assert (tmp_path / "samples.txt").read_bytes() == wanted.encode()


def test_the_command_reports_and_exits_as_promised(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        __import__("nomatmul.train.recipes", fromlist=["x"]).RECIPES, "tiny", tiny_config
    )
    args = TrainArgs(
        "tiny", (str(text_file),), str(tmp_path / "run"), steps=2, workers=1, json=True
    )
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["step"]) == ("finished", 2)
    assert main(dataclasses.replace(args, json=False)) == 0
    assert "trained 2 steps; the model is in" in capsys.readouterr().out
    assert held_out(tmp_path / "run") == [(2, result["valid_loss"])]
