"""Several processes train the model that one would: same batches, losses, norms, scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from many_jobs import start_many, train_any
from safetensors.torch import load_file
from torch import nn
from train_jobs import held_out, losses, tiny_config, train_here

from nomatmul.train import TrainConfig
from nomatmul.train.batches import Batches, Slice, WindowOrder
from nomatmul.train.manifest import find_fault
from nomatmul.train.metrics import read_metrics
from nomatmul.train.plan import DevicePlan

CLOSE = {"rel": 2e-4}  # a ternary weight on the border may flip by a rounding of the sum


def config_of_many(**changes: object) -> TrainConfig:
    return tiny_config(micro_batch_size=1, log_interval=1, **changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run of 12 steps in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    train_here(config_of_many(sample_interval=6, sample_tokens=4), text_file, out)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The same run in two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    train_any(2, config_of_many(sample_interval=6, sample_tokens=4), text_file, out)
    return out


def test_two_ranks_train_what_one_trains(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), **CLOSE)
    norms = [[row["grad_norm"] for row in read_metrics(out) if "loss" in row] for out in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-5)
    assert [step for step, _ in held_out(two)] == [6, 12]
    for (_, a), (_, b) in zip(held_out(one), held_out(two), strict=True):
        assert b == pytest.approx(a, **CLOSE)


def test_reports_of_two_ranks_are_those_of_one(one: Path, two: Path) -> None:
    rows = [[row for row in read_metrics(out) if "flip_rate" in row] for out in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        assert a["layers"].keys() == b["layers"].keys()
        for name in ("ternary_minus", "ternary_zero", "ternary_plus", "flip_rate"):
            assert b[name] == pytest.approx(a[name], abs=1e-3)
    texts = [(out / "samples.txt").read_text() for out in (one, two)]
    assert texts[0] == texts[1]


def test_every_checkpoint_of_two_ranks_is_a_model_directory(two: Path) -> None:
    from nomatmul.formats.checkpoint import open_checkpoint
    from nomatmul.models import CausalLM

    newest = two / "checkpoints/step-00000012"
    assert find_fault(newest) is None
    assert {path.name for path in newest.glob("random-*")} == {
        "random-0000.safetensors",
        "random-0001.safetensors",
    }
    for directory in (newest, two / "model"):
        model = CausalLM.from_pretrained(directory)
        assert model.tokenizer is not None
        assert open_checkpoint(directory).kind == "training"
    weights, exported = (load_file(p / "model.safetensors") for p in (newest, two / "model"))
    assert all(torch.equal(weights[name], exported[name]) for name in exported)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_cut_every_batch_into_slices(size: int) -> None:
    import itertools

    import numpy as np
    from tokenizers import Tokenizer, models

    from nomatmul.train.tokens import TokenStream

    ids = np.arange(1000, dtype=np.uint16)
    stream = TokenStream((ids,), Tokenizer(models.BPE()), "", 0, 1000, None)
    order = WindowOrder(1000, 8, 0)

    def rows(rank: int, of: int, step: int) -> list[torch.Tensor]:
        """The batches of steps `step` to 24 (two epochs), each of six sequences."""
        share = Slice(6, rank, of)
        batches = Batches(stream, order, 1, DevicePlan(torch.device("cpu")), share).run(step * 6)
        return [x for x, _ in itertools.islice(batches, (25 - step) * share.rows)]

    whole = rows(0, 1, 0)
    for step in (0, 7):
        parts = [rows(rank, size, step) for rank in range(size)]
        share = 6 // size
        joined = [
            x
            for at in range(25 - step)
            for part in parts
            for x in part[at * share : (at + 1) * share]
        ]
        assert all(torch.equal(a, b) for a, b in zip(whole[step * 6 :], joined, strict=True))


def _run_small(check: str, out: str) -> None:
    """In each of the ranks: run a function of this file with a sharded model."""
    from nomatmul.train.model import build_model
    from nomatmul.train.parallelize import shard_model
    from nomatmul.train.ranks import open_ranks

    ranks, _ = open_ranks("cpu", 60)
    torch.manual_seed(3)
    model = build_model(tiny_config().model)
    plain = build_model(tiny_config().model)
    plain.load_state_dict(model.state_dict())
    shard_model(model, torch.device("cpu"), ranks.size)
    globals()[check](ranks, model, plain)
    Path(out, f"{check}-{ranks.rank}").write_text("passed")
    ranks.close()


def run_check(check: str, tmp_path: Path, ranks: int = 2) -> None:
    job = start_many(ranks, tmp_path / check, _run_small, check, str(tmp_path))
    assert job.join() == [0] * ranks, job.everything()
    assert len(list(tmp_path.glob(f"{check}-*"))) >= ranks


def check_gradients(ranks, model: nn.Module, plain: nn.Module) -> None:
    """Gradients, their norm, and one step, of targets that are unevenly ignored."""
    from nomatmul.train.optimizer import build_optimizer, clip_gradients
    from nomatmul.train.parallelize import whole
    from nomatmul.train.trainer import target_weights

    config = config_of_many(clip_norm=0.01, precision="float32")
    x_BT = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))
    y_BT = x_BT.roll(-1, 1)
    y_BT[0, 3:] = -100
    y_BT[3, :5] = -100
    counted = (y_BT != -100).sum()

    plain.loss(x_BT, y_BT)[0].backward()
    norm = clip_gradients(plain, config.clip_norm)

    mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    micro = [(x_BT[mine][i : i + 1], y_BT[mine][i : i + 1]) for i in range(2)]
    total = torch.zeros(())
    for (x, y), weight in zip(micro, target_weights([y for _, y in micro], ranks), strict=True):
        loss = model.loss(x, y)[0] * weight / 2
        loss.backward()
        total += loss.detach()
    loss = ranks.sum(total).item() / ranks.size
    assert loss == pytest.approx(plain.loss(x_BT, y_BT)[0].item(), rel=1e-5)
    assert counted < y_BT.numel()
    assert clip_gradients(model, config.clip_norm).item() == pytest.approx(norm.item(), rel=1e-4)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            whole(parameter.grad), wanted[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )
    for each in (model, plain):
        build_optimizer(each, config, DevicePlan(torch.device("cpu"))).step()


def test_norm_and_gradients_are_those_of_the_whole(tmp_path: Path) -> None:
    run_check("check_gradients", tmp_path)


def check_scales(ranks, model: nn.Module, plain: nn.Module) -> None:
    """The scale and the ternary weights that a forward pass uses, under autocast too."""
    from nomatmul.models.diagnostics import bit_linears
    from nomatmul.ops.bitlinear import absmean_ternarize
    from nomatmul.train.diagnostics import _ternary_parts
    from nomatmul.train.parallelize import whole

    seen: dict[str, tuple] = {}
    wanted = {name: absmean_ternarize(layer.weight) for name, layer in bit_linears(plain)}
    for name, layer in bit_linears(model):
        layer.register_forward_pre_hook(
            lambda module, _, name=name: seen.__setitem__(name, absmean_ternarize(module.weight))
        )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.loss(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
    assert seen.keys() == wanted.keys()
    for name, (t, w_scale) in wanted.items():
        assert torch.equal(seen[name][0], t), name
        assert torch.equal(seen[name][1], w_scale), name
    from nomatmul.train.parallelize import free_gathered

    free_gathered(model)
    parts = _ternary_parts(model, ranks)
    counts = ranks.sum(torch.stack([(part > 0).sum() for part in parts.values()]))
    assert counts.tolist() == [float((t > 0).sum()) for t, _ in wanted.values()]
    whole(next(model.parameters()))


def test_scales_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    run_check("check_scales", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "block"},
        {"loss_chunks": 2},
        {"model": {"tie_embeddings": True}},
        {"model": {"token_mixer": "attention", "linear": "dense", "num_heads": 2}},
    ],
    ids=["recompute", "chunks", "tied", "transformer"],
)
def test_every_dial_trains_on_two_ranks(changes: dict, tmp_path: Path, text_file: Path) -> None:
    config = config_of_many(steps=3, schedule="constant", diagnostics_interval=0, eval_interval=2)
    model = dataclasses.replace(config.model, **changes.pop("model", {}))
    config = dataclasses.replace(config, model=model, **changes)
    for ranks in (1, 2):
        train_any(ranks, config, text_file, tmp_path / f"{ranks}")
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), **CLOSE)


def _with_clocks_that_differ(config: dict, text: str, out: str, options: dict) -> None:
    """As `train_job`; the clock of rank 1 gains a second a step, that of rank 0 stands still."""
    import os

    from many_jobs import train_job

    from nomatmul.train import loop

    gain, seconds, step = int(os.environ["RANK"]), [0], loop.Loop.take_step

    def ticking(self: loop.Loop, *arguments: Any) -> Any:
        seconds[0] += gain
        return step(self, *arguments)

    loop.Loop.take_step = ticking  # type: ignore[method-assign]
    loop.Clock.elapsed = lambda self: self.before + seconds[0]  # type: ignore[method-assign]
    train_job(config, text, out, options)


def test_a_time_limit_is_one_clock_for_all(tmp_path: Path, text_file: Path) -> None:
    config = config_of_many(steps=100, time_limit=5.0, schedule="linear", checkpoint_seconds=2.0)
    config = dataclasses.replace(config, checkpoint_interval=0, checkpoint_keep=9)
    out = tmp_path / "run"
    arguments = (config.to_dict(), str(text_file), str(out), {})
    job = start_many(2, out, _with_clocks_that_differ, *arguments)
    assert job.join() == [0, 0], job.everything()
    assert len(losses(out)) == 5
    assert len(list(out.glob("checkpoints/step-*"))) >= 2
