"""The first part of a run in full precision: what is trained, looked at, kept and continued."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from many_jobs import train_any
from safetensors.torch import load_file
from torch import Tensor
from train_jobs import (
    SIGKILL_STATUS,
    held_out,
    losses,
    signal_when,
    start,
    steps_on_disk,
    tiny_config,
    train_here,
)

from nomatmul.models import layers
from nomatmul.models.base import TextModel
from nomatmul.ops.bitlinear import absmax_quantize, root_mean_square, ternary_cache
from nomatmul.train import TrainConfig
from nomatmul.train.batches import WindowOrder
from nomatmul.train.diagnostics import Diagnostics
from nomatmul.train.evaluation import Evaluator
from nomatmul.train.memory import estimate
from nomatmul.train.micro_step import GraphedMicroStep
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import decay_groups
from nomatmul.train.prepare import open_built
from nomatmul.train.schedule import learning_rate


def phased(**changes: object) -> TrainConfig:
    """Six steps of twelve in full precision; looks inside the phase, at its end and behind it."""
    values: dict[str, object] = {"full_precision": 0.5, "log_interval": 1, "eval_interval": 3}
    return tiny_config(**(values | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("phases") / "run"
    train_here(phased(sample_interval=3, sample_tokens=5), text_file, out)
    return out


def unrounded(
    x: Tensor, weight: Tensor, norm: Tensor, eps: float, *, rms: Tensor | None = None, **_: Any
) -> Tensor:
    """The layer as autograd sees it: int8 inputs, the weight as it is."""
    y = x / root_mean_square(x, eps) * norm
    q, step = absmax_quantize(y)
    return F.linear(y + (q * step - y).detach(), weight)


def test_a_run_is_the_loop_written_by_hand(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = phased(micro_batch_size=4, eval_interval=0, diagnostics_interval=0)
    out = tmp_path / "run"
    train_here(config, text_file, out)
    data = open_built(config, {"train": [str(out / "tokens/train")], "valid": []}).train
    order = WindowOrder(len(data), config.sequence_length, config.seed)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.weight_decay), betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )  # fmt: skip
    ternary, found = layers.bit_linear, []
    for step in range(config.steps):
        starts = order.starts(step * config.batch_size, config.batch_size)
        windows = data.windows(starts, config.sequence_length + 1)
        tokens = torch.as_tensor(windows.astype("int64"))
        monkeypatch.setattr(layers, "bit_linear", unrounded if step < 6 else ternary)
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, step / config.steps)
        optimizer.step()
        found.append(loss.item())
    assert losses(out)[:6] == pytest.approx(found[:6], rel=1e-4)
    assert losses(out) == pytest.approx(found, rel=1e-3)  # ternary weights turn by a last bit
    assert found[6] > found[5]  # rounded all at once


def test_what_looks_at_the_model_sees_the_weights_that_train(
    tmp_path: Path, text_file: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, samples, diagnostics; the exported model is an ordinary one."""
    seen: list[tuple[str, bool]] = []

    def watch(name: str, owner: Any, method: str) -> None:
        kept = getattr(owner, method)

        def watched(self: Any, *args: Any, **options: Any) -> Any:
            model = current[0]
            seen.append((name, model.layers[0].mixer.i_proj.full_precision))
            assert model.head.full_precision == seen[-1][1]
            return kept(self, *args, **options)

        monkeypatch.setattr(owner, method, watched)

    current: list[Any] = []
    set_mode = TextModel.set_full_precision

    def noted(self: TextModel, on: bool) -> None:
        current[:] = [self]
        set_mode(self, on)

    monkeypatch.setattr(TextModel, "set_full_precision", noted)
    watch("evaluate", Evaluator, "evaluate")
    watch("diagnose", Diagnostics, "report")
    config = phased(diagnostics_interval=3, steps=12)
    train_here(config, text_file, tmp_path / "run")
    assert seen == [
        (name, step <= 6) for step in (3, 6, 9, 12) for name in ("evaluate", "diagnose")
    ]
    assert losses(tmp_path / "run") == losses(whole)  # looking changes nothing


def test_the_phases_differ_from_runs_without(whole: Path, tmp_path: Path, text_file: Path) -> None:
    train_here(phased(full_precision=0.0), text_file, tmp_path / "ternary")
    train_here(phased(full_precision=0.9), text_file, tmp_path / "longer")
    ternary, longer = losses(tmp_path / "ternary"), losses(tmp_path / "longer")
    assert losses(whole)[0] != ternary[0]
    assert losses(whole)[:6] == longer[:6]
    assert losses(whole)[6] != longer[6]


def test_killed_inside_the_phase_at_its_end_and_behind_it(
    whole: Path, tmp_path: Path, text_file: Path
) -> None:
    """Checkpoints lie at 3, 6 (where the phase ends) and 9."""
    out, kills = tmp_path / "run", 0
    config = phased(sample_interval=3, sample_tokens=5)
    for wanted in (4, 9, 14):  # rows, those of reports among them
        status = signal_when(
            start(config, text_file, out),
            signal.SIGKILL,
            lambda wanted=wanted: steps_on_disk(out) >= wanted,
        )
        assert status in (0, SIGKILL_STATUS)
        kills += status == SIGKILL_STATUS
    assert kills
    assert train_here(config, text_file, out).status == "finished"
    assert losses(out) == losses(whole)
    assert held_out(out) == held_out(whole)
    left, right = (load_file(path / "model/model.safetensors") for path in (out, whole))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_continued_at_every_checkpoint(
    whole: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped there by a signal, which saves: inside the phase, at its end, behind it."""
    config = dataclasses.replace(phased(), checkpoint_interval=0)
    out = tmp_path / "run"
    monkeypatch.setattr(
        "nomatmul.train.trainer.Trainer._agree", lambda self: self.step == step and 15
    )
    assert train_here(config, text_file, out).step == step
    monkeypatch.undo()
    assert train_here(config, text_file, out).status == "finished"
    assert losses(out) == losses(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 2, "activation": "silu"},
        {"token_mixer": "attention", "num_heads": 2, "linear_norm": "sub", "rounding": "even"},
    ],
    ids=["mlgru", "trees", "attention"],
)
def test_two_ranks_train_what_one_trains(
    changes: dict[str, object], tmp_path: Path, text_file: Path
) -> None:
    model = dataclasses.replace(tiny_config().model, **changes)
    config = phased(model=model, micro_batch_size=1, steps=4, eval_interval=2)
    for ranks in (1, 2):
        train_any(ranks, config, text_file, tmp_path / str(ranks))
    one, two = tmp_path / "1", tmp_path / "2"
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    assert losses(two) == pytest.approx(losses(one), rel=3e-3)
    assert held_out(two)[0][1] == pytest.approx(held_out(one)[0][1], rel=1e-3)


def test_by_the_clock_where_there_is_a_time_limit(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second of ten: the first three begin before 30 % of the time are over."""
    config = phased(time_limit=10.0, steps=1000, full_precision=0.3, eval_interval=0)
    monkeypatch.setattr("nomatmul.train.trainer.Trainer._elapsed", lambda self: float(self.step))
    seen: list[bool] = []
    monkeypatch.setattr(
        "nomatmul.train.trainer.batch_size",
        lambda config, share, unit: (seen.append(share < 0.3), config.batch_size)[1],
    )
    modes: list[bool] = []
    set_mode = TextModel.set_full_precision
    monkeypatch.setattr(
        TextModel, "set_full_precision",
        lambda self, on: (modes.append((on, len(seen))), set_mode(self, on))[1],
    )  # fmt: skip
    train_here(config, text_file, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 10
    assert modes == [(True, 0), (False, 3)]


def test_memory_counts_what_the_phase_keeps() -> None:
    plain, full = (estimate(tiny_config(full_precision=share), 1, "none") for share in (0.0, 0.5))
    assert full.ternary == 2 * plain.ternary > 0
    wide = estimate(tiny_config(full_precision=0.5, precision="float32"), 1, "none")
    assert wide.ternary == 4 * plain.ternary


def test_a_recorded_step_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, gradients at fixed addresses and the cache: the next step begins as the first."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    cache = ternary_cache()
    micro = GraphedMicroStep(lambda x, y: None, 0.0, cache.clear)  # type: ignore[arg-type]
    parameter.grad = torch.ones(1)
    micro.graphs[True] = "a graph"  # type: ignore[assignment]
    micro.end(optimizer)
    assert parameter.grad is not None  # the next replay writes over it
    micro.forget()
    assert parameter.grad is None
    assert micro.graphs == {}
    assert micro.optimizer is None
