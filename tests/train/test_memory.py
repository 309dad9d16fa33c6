"""What a run needs is reported before it starts, with what would fit; a real refusal likewise."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from train_jobs import tiny_config, train_here

from nomatmul.train import TrainConfig, recipe
from nomatmul.train.config import differences
from nomatmul.train.memory import (
    MODES,
    MemoryPlan,
    OutOfMemoryError,
    activation_bytes,
    estimate,
    free_memory,
    plan_memory,
)
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import Ranks

GIB = 1 << 30
GPU = DevicePlan(torch.device("cuda"), memory="device", kernels=True)
CPU = DevicePlan(torch.device("cpu"))


def with_free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr("nomatmul.train.memory.free_memory", lambda *_: int(gib * GIB))


def test_states_are_sixteen_bytes_a_parameter_shared_by_the_ranks() -> None:
    config = recipe("mmfree_1_3b")
    count = config.model.param_count()
    one, four = estimate(config, 1, "none"), estimate(config, 4, "none")
    assert one.states == 16 * count
    assert four.states == 4 * count
    assert one.gathered == 0 < four.gathered < one.states
    assert four.activations == one.activations


@pytest.mark.parametrize("name", ["mmfree_370m", "transformer_370m"])
@pytest.mark.parametrize("fused", [True, False])
def test_each_mode_needs_less_than_the_one_before(name: str, fused: bool) -> None:
    needs = [estimate(recipe(name), 1, mode, fused).total for mode in MODES]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 3


def test_only_layers_of_fused_operations_keep_ternary_weights() -> None:
    config = recipe("mmfree_370m")
    attention = dataclasses.replace(config.model, token_mixer="attention", num_heads=16)
    grouped = dataclasses.replace(attention, linear_norm="none", scale_group=128)
    for model, kept in ((config.model, True), (attention, True), (grouped, False)):
        need = estimate(dataclasses.replace(config, model=model), 1, "none")
        assert (need.ternary > 0) == kept
    wide = dataclasses.replace(attention, head_dim=128)
    assert activation_bytes(wide, 100, "none", True) > activation_bytes(
        attention, 100, "none", True
    )


def test_auto_takes_the_first_mode_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("mmfree_1_3b")
    for mode in MODES:
        with_free(monkeypatch, estimate(config, 1, mode).total / GIB + 0.01)
        assert plan_memory(config, GPU, Ranks.alone()).recompute == mode
        with_free(monkeypatch, 500)
        chosen = dataclasses.replace(config, recompute=mode)
        assert plan_memory(chosen, GPU, Ranks.alone()).recompute == mode


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(recipe("mmfree_2_7b"), micro_batch_size=64, recompute="none")
    for gib, advice in (
        (80, r"--set recompute=block --set micro_batch_size=\d+ would fit$"),
        (24, r"4 devices would fit \(torchrun --nproc-per-node 4, recompute=block"),
        (2, r"no setting of this model fits: choose a smaller one"),
    ):
        with_free(monkeypatch, gib)
        with pytest.raises(OutOfMemoryError) as info:
            plan_memory(config, GPU, Ranks.alone())
        text = str(info.value)
        assert re.match(r"too little device memory: about [\d.]+ GiB \(optimiser, ", text)
        assert f"{gib}.0 GiB are free" in text
        assert re.search(advice, text), text
        assert "\n" not in text


def test_the_devices_own_refusal_becomes_one_line() -> None:
    plan = MemoryPlan(recipe("mmfree_370m"), 1, "none", 200 * GIB)
    refusal = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\n.."
    message = r"Tried to allocate 2.00 GiB.*200.0 GiB are free; --set recompute=mlp would fit$"
    with pytest.raises(OutOfMemoryError, match=message) as info, plan.advising():
        raise torch.OutOfMemoryError(refusal)
    assert "\n" not in str(info.value)


def test_a_run_that_a_cpu_cannot_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_file: Path
) -> None:
    config = tiny_config()
    need = estimate(config, 1, "none", fused=False, host=True).total
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: need)
    assert plan_memory(config, CPU, Ranks.alone()).recompute == "none"
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: need - 1)
    with pytest.raises(OutOfMemoryError) as info:
        train_here(config, text_file, tmp_path / "run")
    assert re.fullmatch(
        r"too little memory: about 0.3 GiB \(.*\) are needed with recompute=none, 0.3 GiB are "
        r"free; --set recompute=mlp would fit \(--force tries it anyway\)",
        str(info.value),
    )
    assert not (tmp_path / "run").exists()
    short = tiny_config(steps=1, eval_interval=0)
    assert train_here(short, text_file, tmp_path / "run", force=True).status == "finished"
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: None)
    assert plan_memory(recipe("mmfree_2_7b"), CPU, Ranks.alone()).recompute == "none"


def test_processes_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomatmul.train.memory.available_memory", lambda: 12 * GIB)
    assert free_memory(CPU, 3) == 4 * GIB


def test_a_hosts_own_refusal_becomes_one_line() -> None:
    plan = MemoryPlan(recipe("cpu_minute"), 1, "none", 2 * GIB, fused=False, host=True)
    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory; about .* 2.0 GiB are free"),
        plan.advising(),
    ):
        torch.empty(1 << 55, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another fault"), plan.advising():
        raise RuntimeError("another fault")


def test_runs_of_before_the_recompute_dial_are_read() -> None:
    values = tiny_config().to_dict()
    del values["recompute"]
    for old, new in ((True, "block"), (False, "none")):
        config = TrainConfig.from_dict(values | {"activation_checkpointing": old})
        assert config.recompute == new
        assert not differences(config, tiny_config())
    with pytest.raises(ValueError, match="recompute 'some': choose one of auto, none, mlp, block"):
        tiny_config(recompute="some")


def test_trees_count_what_a_token_visits() -> None:
    """UltraFastBERT's one tree keeps less for the backward pass than its dense twin."""
    fast, dense = recipe("ultrafastbert_1x11"), recipe("crammedbert")
    small, large = (estimate(config, 1, "none") for config in (fast, dense))
    tokens, layers = 128 * 128, 16
    assert large.activations - small.activations >= tokens * layers * 14 * (3072 - 12)
    # where some layers hold a dense layer, those count as such
    every = dataclasses.replace(fast.model, fff_layers=tuple(range(1, layers, 2)))
    mixed = estimate(dataclasses.replace(fast, model=every), 1, "none")
    assert mixed.activations - small.activations == tokens * (layers // 2) * 14 * (3072 - 12) + (
        tokens * (20 * 3072 - 38 * 768)
    )
    # of the hidden tokens only the logits are made, and in chunks where the fused loss serves
    whole = estimate(fast, 1, "none", fused=False)
    assert whole.logits == 128 * 32 * 32_768 * 10
