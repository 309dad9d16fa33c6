"""Encoders with trees on a GPU: graphs of the masked step and of fine-tuning, and torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from nomatmul.finetune.data import Encoded
from nomatmul.finetune.loop import Settings, train_seed
from nomatmul.finetune.tasks import TASKS
from nomatmul.formats.config import ModelConfig
from nomatmul.models import EncoderForSequenceClassification
from nomatmul.models.hf.config import EncoderConfig
from nomatmul.train import TrainConfig
from nomatmul.train.masking import Masking
from nomatmul.train.micro_step import GraphedMicroStep, build_micro_step
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer
from nomatmul.train.plan import plan_device, plan_training

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "causal": False,
    "token_mixer": "attention", "linear": "dense", "norm": "layer", "positions": "sinusoidal",
    "embedding_norm": True, "tie_embeddings": True, "max_position_embeddings": 64,
    "channel_mixer": "fff", "fff_trees": 4, "fff_depth": 3, "fff_bias": True,
}  # fmt: skip


def _losses(compile_mode: str) -> tuple[list[float], Any]:
    """Losses of the first micro-batches, and the micro-step."""
    torch.manual_seed(1)
    config = TrainConfig(
        recipe="test", model=ModelConfig(**SIZES), sequence_length=64, batch_size=8,
        micro_batch_size=4, learning_rate=1e-3, fff_balance=0.01, compile=compile_mode,
    )  # fmt: skip
    model = build_model(config.model).cuda()
    plan = plan_training(config, CUDA)
    optimizer = build_optimizer(model, config, plan)
    step = build_micro_step(build_loss(model, config, plan), config.z_loss, plan, lambda: None)
    masking, half, losses = Masking(16, 4, 300, 0), torch.full((), 0.5, device="cuda"), []
    random = torch.Generator().manual_seed(2)
    for number in range(10):
        ids_BT = torch.randint(5, 300, (4, 64), generator=random).cuda()
        x_BT, y_BT = masking(ids_BT, torch.arange(4, device="cuda") + 4 * number)
        losses.append(float(step(x_BT, y_BT, half, number % 2 == 0)))
        # two layers, each between 1 and 2
        assert 0.019 < float(step.beside["auxiliary_loss"]) < 0.041
        if number % 2:
            optimizer.step()
            step.end(optimizer)
    return losses, step


@pytest.mark.parametrize("mode", ["graph", "on"])
def test_masked_steps_of_trees_are_those_of_launched_kernels(mode: str) -> None:
    expected, _ = _losses("off")
    found, step = _losses(mode)
    if mode == "graph":
        assert isinstance(step, GraphedMicroStep)
        assert step.failed is None
    assert found == pytest.approx(expected, rel=2e-2)  # bfloat16, and decisions near zero


@pytest.mark.parametrize("regression", [False, True])
def test_fine_tuning_replays_a_graph_and_learns(regression: bool) -> None:
    """The first token decides; the last batch of an epoch is padded to the shape of the others."""
    torch.manual_seed(0)
    labels, hidden = 1 if regression else 2, {"hidden_dropout": 0.0, "classifier_dropout": 0.0}
    config = EncoderConfig(**SIZES, num_labels=labels, pooler_size=32, **hidden)
    model = EncoderForSequenceClassification(config).cuda()
    ids = torch.randint(5, 300, (230, 12), dtype=torch.int32)
    truth = torch.randint(0, 2, (230,))
    ids[:, 0] = torch.where(truth > 0, 3, 4).int()
    ids[:, 9:] = -1
    truth = truth.float() if regression else truth
    data = Encoded(ids.cuda(), truth.cuda(), np.full(230, 9), 0)
    task = TASKS["stsb" if regression else "sst2"]
    settings, plan = Settings(learning_rate=3e-3, epochs=6), plan_device(CUDA, "bfloat16")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be recorded.*")
        result = train_seed(model, task, data, {"dev": data}, settings, 0, plan)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.scores["dev"][task.metrics[0]] > 0.9
