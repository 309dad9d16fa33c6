"""transformers' `Trainer` on every class: train, evaluate, predict, save and resume."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import build as build_encoder
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from nomatmul.models import EncoderForSequenceClassification as SequenceClassifier
from nomatmul.models import EncoderForTokenClassification as TokenClassifier
from nomatmul.models import MaskedLM

ROWS = 10


def rows(label: str, length: int = 7) -> list[dict[str, Any]]:
    """A data set; labels as of the class: "ids", "masked", "class", "tags" or "float"."""
    rng = np.random.default_rng(3)
    made = []
    for row in range(ROWS):
        ids = rng.integers(3, 60, length).tolist()
        ignored = [-100] * (2 + row % 3)
        labels = {
            "ids": ids[: -len(ignored)] + ignored,
            "masked": ignored + ids[len(ignored) :],
            "class": row % 3,
            "tags": ignored + [i % 3 for i in ids[len(ignored) :]],
            "float": [float(row % 2), 1.0, 0.0],
        }
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels[label]})
    return made


CLASSES = {
    "causal": (None, "ids", (ROWS, 7, 64)),
    "masked": (MaskedLM, "masked", (ROWS, 7, 64)),
    "sequences": (SequenceClassifier, "class", (ROWS, 3)),
    "several questions": (SequenceClassifier, "float", (ROWS, 3)),
    "tokens": (TokenClassifier, "tags", (ROWS, 7, 3)),
}


def make(build, kind: str, **values: Any) -> torch.nn.Module:
    cls = CLASSES[kind][0]
    return build(**values) if cls is None else build_encoder(cls, num_labels=3, **values)


def trainer(model, folder, data, **arguments: Any) -> Trainer:
    seen = arguments.pop("seen", None)

    def metrics(prediction) -> dict[str, float]:
        if seen is not None:
            seen.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.predictions))}

    options = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "seed": 5}
    plan = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **{**options, **arguments}
    )
    return Trainer(model, plan, train_dataset=data, eval_dataset=data, compute_metrics=metrics)


@pytest.mark.parametrize("collect", [False, True], ids=["plain", "hidden states"])
@pytest.mark.parametrize("kind", CLASSES)
def test_train_evaluate_predict(build, tmp_path, kind, collect):
    model, seen = make(build, kind), []
    model.config.output_hidden_states = collect
    before = copy.deepcopy(model.state_dict())
    _, label, shape = CLASSES[kind]
    data = rows(label)
    run = trainer(model, tmp_path, data, seen=seen)
    run.train()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert run.evaluate()["eval_rows"] == ROWS
    predicted = run.predict(data)
    assert seen == [shape, shape]
    assert predicted.predictions.shape == shape
    batch = {k: torch.tensor([row[k] for row in data]) for k in data[0]}
    with torch.no_grad():
        out = model(**batch)
    np.testing.assert_allclose(predicted.predictions, out.logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_predictions_hold_no_cache(build, tmp_path, name):
    model = build(name, use_cache=True)
    assert trainer(model, tmp_path, rows("ids")).predict(rows("ids")).predictions.ndim == 3


@pytest.mark.parametrize("kind", ["causal", "masked", "tokens", "sequences"])
def test_small_batches_add_up_to_a_large_one(build, tmp_path, kind):
    """Rows have different numbers of labels: the mean is over the labels of all micro-batches."""
    dropout = {} if kind == "causal" else {"hidden_dropout": 0.0, "classifier_dropout": 0.0}
    data, results = rows(CLASSES[kind][1]), []
    for batch, parts in ((8, 1), (2, 4)):
        model = make(build, kind, linear="dense", **dropout)
        arguments = {"gradient_accumulation_steps": parts, "max_steps": 1, "optim": "sgd"}
        trainer(
            model, tmp_path, data, per_device_train_batch_size=batch, learning_rate=0.1, **arguments
        ).train()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=2e-6, msg=name)


def test_a_loss_is_divided_by_what_the_batch_holds(build, ids):
    model = build()
    labels = ids.clone()
    labels[:, 9:] = -100
    with torch.no_grad():
        mean = model(ids, labels=labels).loss
        share = model(ids, labels=labels, num_items_in_batch=64).loss
    assert share.item() == pytest.approx(mean.item() * 16 / 64)


def test_label_smoothing_shifts_the_labels_of_a_language_model(build, tmp_path):
    model, data = build(), rows("ids")
    run = trainer(
        model, tmp_path, data, label_smoothing_factor=0.2, per_device_eval_batch_size=ROWS
    )
    ids, labels = (torch.tensor([row[k] for row in data]) for k in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    run.train()


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_a_run_is_resumed_from_a_checkpoint(build, tmp_path, name):
    data, arguments = rows("ids"), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"gradient_checkpointing": True, "logging_steps": 1}
    whole = build(name)
    trainer(whole, tmp_path / "run", data, **arguments).train()
    resumed = build(name)
    with torch.no_grad():
        resumed.embedding.weight.zero_()  # whatever it was: the checkpoint holds the weights
    again = trainer(resumed, tmp_path / "again", data, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in whole.state_dict().items())
