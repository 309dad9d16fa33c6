"""lm-evaluation-harness through the server and beside it: the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from support.serving import Running

from benchmarks.zero_shot_rows import TASKS, write_local_data
from nomatmul.engine.loading import BOX
from nomatmul.evaluate.harness import HarnessModel

BOX_NAME = "nomatmul-box"


@pytest.fixture(scope="module")
def beside(server: Running) -> HarnessModel:
    return HarnessModel(lm=server.server.models[BOX_NAME].lm)


def through(server: Running, **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=BOX_NAME,
        tokenizer=str(BOX),
        tokenizer_backend="huggingface",
        max_retries=1,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 5}, {"num_concurrent": 6}],
    ids=["batches", "side by side"],
)
def test_local_tasks_have_equal_results(
    server: Running, beside: HarnessModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    data = str(write_local_data(tmp_path))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": data})
    found = [
        simple_evaluate(model, tasks=["local_tasks"], task_manager=manager, bootstrap_iters=0)
        for model in (beside, through(server, **options))
    ]
    ours, theirs = found
    assert ours is not None
    assert theirs is not None
    requests = 0
    for name, samples in ours["samples"].items():
        for one, other in zip(samples, theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (that,) in zip(one["resps"], other["resps"], strict=True):
                assert mine[0] == pytest.approx(that[0], abs=1e-6)
                assert mine[1] == that[1]
                requests += 1
    assert requests > 40
    for name, values in ours["results"].items():
        for metric, value in values.items():
            if metric.endswith(",none") and not isinstance(value, str):  # "N/A": no standard error
                assert theirs["results"][name][metric] == pytest.approx(value, rel=1e-9), metric


def test_whole_texts_and_answers_are_equal(server: Running, beside: HarnessModel) -> None:
    api = through(server)
    texts = [("The river was wide and the bridge was old. " * 4,), ("Once",)]
    rolling = [Instance("loglikelihood_rolling", {}, text, at) for at, text in enumerate(texts)]
    assert beside.loglikelihood_rolling(rolling) == pytest.approx(
        api.loglikelihood_rolling(rolling), abs=1e-6
    )
    options = [
        {"until": [".", "\n"], "max_gen_toks": 24},
        {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 0.8, "top_p": 0.9},
    ]
    asked = [
        Instance("generate_until", {}, (prompt, dict(option)), at)
        for at, (prompt, option) in enumerate(
            (prompt, option) for prompt in ("The king", "In the year") for option in options
        )
    ]
    ours = beside.generate_until(asked)
    assert ours == api.generate_until(asked)
    assert all(ours)
