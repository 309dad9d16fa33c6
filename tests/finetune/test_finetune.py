"""Fine-tuning learns a toy task, reports it, goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nomatmul import cli
from nomatmul.finetune import FinetuneConfig, TaskReport, find_task, finetune
from nomatmul.finetune.data import Order, encode, scoring_batches
from nomatmul.finetune.loop import Settings, loss_of, rate_at, score
from nomatmul.finetune.sources import load_rows
from nomatmul.finetune.tsv import Rows
from nomatmul.models import EncoderForSequenceClassification, MaskedLM
from nomatmul.models.hf.config import EncoderConfig
from nomatmul.train.plan import DevicePlan
from nomatmul.train.tokenizer import word_piece

WORDS = ["the", "river", "runs", "under", "an", "old", "stone", "bridge", "boats", "wait", "light"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CPU = DevicePlan(torch.device("cpu"))
CONFIG = FinetuneConfig(learning_rate=3e-3, seeds=2, epochs=3, max_length=12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's directory with a tiny encoder of fast feedforward layers."""
    out = tmp_path_factory.mktemp("runs") / "encoder"
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=16,
        channel_mixer="fff", fff_trees=2, fff_depth=2, fff_bias=True, initializer_range=0.1,
        pooler_size=16, hidden_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    MaskedLM(config).save_pretrained(out / "model")
    tokenizer = word_piece({word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    tokenizer.save(str(out / "model/tokenizer.json"))
    return out


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Class 1 has the word river, class 0 the word bridge; the rest is chance."""
    choose = random.Random(seed)
    rest = [word for word in WORDS if word not in ("river", "bridge")]
    rows = []
    for _ in range(count):
        label = choose.randrange(2)
        words = choose.choices(rest, k=choose.randrange(3, 8))
        words.insert(choose.randrange(len(words)), ("bridge", "river")[label])
        rows.append((" ".join(words), label))
    return rows


def write(path: Path, rows: list[tuple[Any, ...]], header: str = "sentence\tlabel") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    write(folder / "SST-2/train.tsv", sentences(200, 0))
    write(folder / "SST-2/dev.tsv", sentences(60, 1))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, encoder: Path, glue: Path) -> TaskReport:
    out = tmp_path_factory.mktemp("done")
    return finetune(encoder, find_task("sst2"), glue, out, CONFIG, device="cpu", quiet=True)


def test_a_separable_task_is_learnt_and_reported(done: TaskReport) -> None:
    assert (done.task, done.metric) == ("sst2", "accuracy")
    assert done.median > 0.95
    assert done.low <= done.median <= done.high
    assert [seed["seed"] for seed in done.seeds] == [0, 1]
    assert done.seeds[0]["losses"] != done.seeds[1]["losses"]
    for seed in done.seeds:
        assert len(seed["losses"]) == len(seed["history"]) == 3
        assert seed["losses"][-1] < 0.5 * seed["losses"][0]
        assert seed["history"][-1] == seed["scores"]["dev"]
    main = [seed["scores"]["dev"]["accuracy"] for seed in done.seeds]
    assert done.median == pytest.approx(sum(main) / 2)
    assert main[done.best_seed] == max(main)
    assert done.data["train"] == {"rows": 200, "truncated": 0, "max_length": 12}
    report = json.loads((Path(done.model).parent / "report.json").read_text())
    assert report == json.loads(json.dumps(dataclasses.asdict(done)))


def test_the_best_model_scores_what_was_reported(done: TaskReport, glue: Path) -> None:
    model = EncoderForSequenceClassification.from_pretrained(done.model)
    assert model.config.id2label == {0: "0", 1: "1"}
    rows, _ = load_rows(find_task("sst2"), glue)
    data = encode(rows["dev"], model.tokenizer, 12, False, CPU.device)
    assert score(model, find_task("sst2"), data, CPU)["accuracy"] == done.high


def test_finished_seeds_are_not_trained_again(
    done: TaskReport, encoder: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(done.model).parents[1]
    trained = []
    from nomatmul.finetune import run

    real = run.train_seed
    monkeypatch.setattr(run, "train_seed", lambda *a, **k: trained.append(a[5]) or real(*a, **k))
    lost = json.loads((out / "sst2/seed-1.json").read_text())
    (out / "sst2/seed-1.json").unlink()
    again = finetune(encoder, find_task("sst2"), glue, out, CONFIG, device="cpu", quiet=True)
    assert trained == [1]
    assert again.seeds[0] == done.seeds[0]
    for key in ("losses", "scores", "history"):
        assert again.seeds[1][key] == lost[key]
    for changes, what in (
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"max_length": 9}, "max_le"),
    ):
        other = dataclasses.replace(CONFIG, **changes)
        with pytest.raises(ValueError, match=f"seed-0.json was made with another {what}"):
            finetune(encoder, find_task("sst2"), glue, out, other, device="cpu", quiet=True)
    (out / "sst2/seed-0.json").write_text("{")
    with pytest.raises(ValueError, match=r"seed-0.json is damaged"):
        finetune(encoder, find_task("sst2"), glue, out, CONFIG, device="cpu", quiet=True)


def test_a_regression_of_pairs_from_ones_own_file(encoder: Path, tmp_path: Path) -> None:
    rows = [(text, "stone light", 2 * label - 0.5) for text, label in sentences(200, 2)]
    file = write(tmp_path / "pairs.tsv", rows, "a\tb\tscore")
    task = find_task(str(file), ("a", "b"), "score", regression=True)
    config = dataclasses.replace(CONFIG, seeds=1)
    report = finetune(encoder, task, file, tmp_path / "out", config, device="cpu", quiet=True)
    assert report.metric == "pearson"
    assert report.median > 0.8
    assert (report.data["train"]["rows"], report.data["held_out"]["rows"]) == (180, 20)
    model = EncoderForSequenceClassification.from_pretrained(report.model)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_long_rows_are_cut_with_a_notice(
    encoder: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = FinetuneConfig(seeds=1, epochs=1, max_length=6, rows=20)
    report = finetune(encoder, find_task("sst2"), glue, tmp_path, config, device="cpu", quiet=True)
    cut = report.data["train"]["truncated"]
    assert 0 < cut <= 20
    assert f"sst2, train: {cut} of 20 rows are longer than 6 tokens" in capsys.readouterr().err
    # the model's own positions are a limit too, of memory as well
    config = FinetuneConfig(seeds=1, epochs=1, max_length=10**9, rows=20)
    report = finetune(
        encoder, find_task("sst2"), glue, tmp_path / "2", config, device="cpu", quiet=True
    )
    assert report.data["train"]["max_length"] == 16


def test_pairs_are_cut_at_the_longer_text() -> None:
    tokenizer = word_piece({word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    texts = [
        ("river " * 9, "old"),
        ("old", "river " * 9),
        ("river " * 9, "old " * 9),
        ("old", "old"),
    ]
    data = encode(Rows(texts, [0, 1, 0, 1]), tokenizer, 10, False, CPU.device)
    river, old = tokenizer.token_to_id("river"), tokenizer.token_to_id("old")
    assert data.truncated == 3
    assert data.ids.tolist()[:3] == [
        [2, *[river] * 6, 3, old, 3],
        [2, old, 3, *[river] * 6, 3],
        [2, *[river] * 4, 3, *[old] * 3, 3],
    ]
    assert data.ids[3].tolist() == [2, old, 3, old, 3, *[-1] * 5]
    ids_BT, labels_B = data.batch(np.asarray([3]))
    assert ids_BT.shape == (1, 8)
    assert (ids_BT >= 0).sum().item() == 5
    assert labels_B.tolist() == [1]
    ids_BT, labels_B = data.batch(np.asarray([3]), rows=4)
    assert ids_BT.shape == (4, 10)
    assert labels_B.tolist() == [1, -100, -100, -100]
    assert data.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"max_length 4 leaves no room for 2 text"):
        encode(Rows(texts, [0] * 4), tokenizer, 4, False, CPU.device)


def test_padded_rows_do_not_count() -> None:
    logits_BC = torch.randn(4, 3)
    labels_B = torch.tensor([2, 0, -100, -100])
    assert torch.equal(loss_of(logits_BC, labels_B), loss_of(logits_BC[:2], labels_B[:2]))
    numbers_B = torch.tensor([0.5, -1.0, math.nan, math.nan])
    one = logits_BC[:, :1].requires_grad_()
    assert torch.equal(loss_of(one, numbers_B), (one[:2, 0] - numbers_B[:2]).square().mean())
    loss_of(one, numbers_B).backward()
    assert one.grad is not None
    assert one.grad[2:].tolist() == [[0.0], [0.0]]
    assert one.grad.isfinite().all()


def test_every_row_is_visited_once_an_epoch() -> None:
    tokenizer = word_piece({word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    rows = Rows([(" ".join(WORDS[: 1 + i % 5]),) for i in range(23)], [0.0] * 23)
    data = encode(rows, tokenizer, 10, False, CPU.device)
    order = Order(data, 4, 1)
    first = [order.places(0, batch) for batch in range(6)]
    assert sorted(np.concatenate(first).tolist()) == list(range(23))
    assert [len(places) for places in first] == [4] * 5 + [3]
    other = [order.places(1, batch) for batch in range(6)]
    assert np.concatenate(other).tolist() != np.concatenate(first).tolist()
    assert Order(data, 4, 1).places(0, 3).tolist() == first[3].tolist()
    scored = np.concatenate(list(scoring_batches(data, 4)))
    assert sorted(scored.tolist()) == list(range(23))
    assert (np.diff(data.lengths[scored]) >= 0).all()


def test_grouped_batches_have_rows_of_like_length() -> None:
    tokenizer = word_piece({word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    random = np.random.default_rng(0)
    texts = [(" ".join(WORDS[:n]),) for n in random.integers(1, 6, 1003)]
    data = encode(Rows(texts, [0.0] * len(texts)), tokenizer, 10, False, CPU.device)
    grouped = dataclasses.replace(data, grouped=True)
    plain_order, order = Order(data, 4, 1), Order(grouped, 4, 1)
    plain = [plain_order.places(0, batch) for batch in range(251)]
    found = [order.places(0, batch) for batch in range(251)]
    assert sorted(np.concatenate(found).tolist()) == list(range(1003))
    assert [len(places) for places in found] == [4] * 250 + [3]

    def padding(batches: list[np.ndarray]) -> int:
        return sum(int((data.lengths[b].max() - data.lengths[b]).sum()) for b in batches)

    assert padding(found) < padding(plain) / 10
    longest = [int(data.lengths[batch].max()) for batch in found]
    assert sorted(longest) not in (longest, longest[::-1])  # short and long ones by turns
    other = [order.places(1, batch) for batch in range(251)]
    assert np.concatenate(other).tolist() != np.concatenate(found).tolist()
    assert Order(grouped, 4, 1).places(0, 3).tolist() == found[3].tolist()


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    settings = Settings(learning_rate=1.0, warmup=0.1)
    rates = [rate_at(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.0, abs=1e-3)


def test_bad_input_is_named(encoder: Path, glue: Path, tmp_path: Path) -> None:
    task = find_task("sst2")

    def refused(message: str, **changes: Any) -> None:
        values = {"model": encoder, "task": task, "data": glue, "out": tmp_path} | changes
        with pytest.raises((ValueError, OSError), match=message):
            finetune(**values, config=CONFIG, device="cpu", quiet=True)

    refused("no train.tsv and no CoLA/train.tsv: give the folder", task=find_task("cola"))
    refused("does not exist", model=tmp_path / "absent")
    write(tmp_path / "SST-2/train.tsv", sentences(5, 0))
    refused("dev.tsv is missing", data=tmp_path)
    write(tmp_path / "SST-2/dev.tsv", [("the river", 2)])
    refused("dev.tsv, line 2: label '2' is not one of 0, 1", data=tmp_path)
    few = write(tmp_path / "few.tsv", sentences(5, 0))
    refused("too few to hold some out", task=find_task(str(few)), data=few)
    for name, value in (("seeds", 0), ("epochs", 0), ("batch_size", -1), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            dataclasses.replace(CONFIG, **{name: value})


def test_the_command(
    encoder: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["finetune", str(encoder), "--task", "sst2", "--out", str(tmp_path), "--quiet"]
    more = ["--seeds", "1", "--epochs", "1", "--rows", "20", "--device", "cpu"]
    assert cli.main([*command, "--data", str(glue), *more, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"][0]["task"] == "sst2"
    assert cli.main([*command, "--data", str(glue), *more]) == 0
    assert "sst2  accuracy" in capsys.readouterr().out
    for arguments, message in (
        (command, "--task sst2 needs --data"),
        ([*command, "--data", str(glue), "--seeds", "0"], "seeds 0 must be at least 1"),
        ([*command, "--data", str(glue), "--regression"], "sst2 is a task of GLUE"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
