"""Packed models in lm-evaluation-harness, on local tasks of a few rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_models import END, RECURRENT, START, chat_model
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from benchmarks.zero_shot_rows import TASKS, write_local_data
from nomatmul.engine import LanguageModel, Sampling, load
from nomatmul.evaluate.harness import HarnessModel


def test_without_the_extra_the_program_says_what_to_install() -> None:
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None;"
        "runpy.run_module('nomatmul.evaluate.harness', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nomatmul: error: the harness needs lm-eval (")
    assert done.stderr.endswith('): pip install "nomatmul[eval]"\n')


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_data(tmp_path_factory.mktemp("data"))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_the_harness_finds_it_by_its_name() -> None:
    assert get_model("nomatmul") is HarnessModel
    model = HarnessModel.create_from_arg_string(
        "threads=1", {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    )
    assert (model.batch_size, model.lm.backend.threads, model.lm.backend.name) == (16, 1, "native")


def test_all_local_tasks_give_what_their_likelihoods_say(lm: LanguageModel, data: Path) -> None:
    model = HarnessModel(lm=lm)
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)}
    )
    found = simple_evaluate(model, tasks=["local_tasks"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    assert {name: values["sample_len"] for name, values in found["results"].items()
            if "sample_len" in values} == {
        "local_arc_easy": 3, "local_arc_challenge": 2, "local_hellaswag": 2,
        "local_lambada_openai": 2, "local_openbook_qa": 3, "local_piqa": 2,
        "local_winogrande": 2,
    }  # fmt: skip
    contexts = {}
    for name, samples in found["samples"].items():
        right = 0
        for sample in samples:
            contexts.setdefault(name, sample["arguments"][0][0])
            values = []
            for (context, continuation), ((logprob, _),) in zip(
                sample["arguments"], sample["resps"], strict=True
            ):
                whole = lm.tokenizer.encode(context + continuation).ids
                split = len(lm.tokenizer.encode(context.rstrip()).ids)
                alone = lm.token_logprobs(whole)[split - 1 :].sum()
                assert logprob == pytest.approx(alone, abs=1e-9)
                values.append(logprob)
            gold = sample["doc"].get("gold")
            right += gold is not None and values.index(max(values)) == gold
        if name != "local_lambada_openai":
            assert found["results"][name]["acc,none"] == pytest.approx(right / len(samples))
    assert contexts["local_hellaswag"] == "Cooking: How to cook rice. Take a pot. He pours"
    assert contexts["local_piqa"] == "Question: Boil an egg.\nAnswer:"


def test_local_tasks_ask_for_their_data() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.raises(ValueError, match="local tasks need their data's directory"):
        manager.load(["local_arc_easy"])


def test_whole_texts_are_scored_behind_the_prefix_in_windows(lm: LanguageModel) -> None:
    text = "The river was wide and the bridge was old. " * 3
    ids = lm.tokenizer.encode(text).ids
    whole = HarnessModel(lm=lm).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert whole == [pytest.approx(lm.token_logprobs([0, *ids]).sum(), abs=1e-9)]
    cut = HarnessModel(lm=lm, max_length=16)
    expected = sum(
        lm.token_logprobs([*([0] if at == 0 else ids[at - 1 : at]), *ids[at : at + 16]]).sum()
        for at in range(0, len(ids) // 16 * 16, 16)
    )
    if rest := len(ids) % 16:  # the last window reaches back, so that it is full
        expected += lm.token_logprobs(ids[-17:])[-rest:].sum()
    assert cut.loglikelihood_rolling(requests("loglikelihood_rolling", (text,))) == [
        pytest.approx(expected, abs=1e-9)
    ]


def test_texts_are_made_as_generate_makes_them(lm: LanguageModel) -> None:
    model = HarnessModel(lm=lm, seed=5)
    prompts = ["The king", "Once upon a time", "In the year", ""]
    greedy = {"until": ["."], "max_gen_toks": 12}
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    found = model.generate_until(
        requests("generate_until", *((p, o) for p in prompts for o in (greedy, drawn)))
    )
    for number, prompt in enumerate(prompts):
        ids = lm.tokenizer.encode(prompt).ids or [0]
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=5)
        assert found[2 * number] == lm.generate(ids, max_tokens=12, stop=["."])
        assert found[2 * number + 1] == lm.generate(ids, max_tokens=8, sampling=sampling)
    with pytest.raises(ValueError, match="generation option 'num_beams' is not one of nomatmul's"):
        model.generate_until(requests("generate_until", ("x", {"num_beams": 3})))


def test_long_requests_lose_what_is_in_front(lm: LanguageModel) -> None:
    model, words = HarnessModel(lm=lm, max_length=8), "zero one two three four five six seven eight"
    ids = lm.tokenizer.encode(words + " nine").ids
    ((logprob, _),) = model.loglikelihood(requests("loglikelihood", (words, " nine")))
    assert len(ids) > 9
    last = len(ids) - len(lm.tokenizer.encode(words).ids)  # tokens of " nine"
    assert logprob == pytest.approx(lm.token_logprobs(ids[-9:])[-last:].sum(), abs=1e-9)
    with pytest.raises(ValueError, match="is longer than the 8 of a request"):
        model.loglikelihood(requests("loglikelihood", ("a", words * 2)))
    with pytest.raises(ValueError, match=r"leave no room in 8 \(max_gen_toks\)"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 8})))
    made = model.generate_until(requests("generate_until", (words, {"max_gen_toks": 3})))
    assert made == [lm.generate(lm.tokenizer.encode(words).ids[-5:], max_tokens=3)]


def test_texts_begin_with_bos_where_it_is_asked_for(lm: LanguageModel) -> None:
    model = HarnessModel(lm=lm, add_bos_token=True)
    ids = lm.tokenizer.encode("The king").ids
    assert model.tok_encode("The king") == [0, *ids]
    assert model.tok_encode("The king", add_special_tokens=False) == ids
    ((logprob, _),) = model.loglikelihood(requests("loglikelihood", ("The", " king")))
    assert logprob == pytest.approx(lm.token_logprobs([0, *ids])[1:].sum(), abs=1e-9)


def test_conversations_go_through_the_models_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    lm = chat_model(tmp_path, RECURRENT, template)
    model = HarnessModel(lm=lm)
    text = model.apply_chat_template([{"role": "user", "content": "a <|im_end|> b"}])
    ids = model.tok_encode(text)
    assert (ids[0], ids[-len("assistant\n") - 1], ids.count(END)) == (START, START, 1)
    ((logprob, _),) = model.loglikelihood(requests("loglikelihood", (text + "It", " is")))
    whole = [*ids, *lm.prompt_ids("It is", fresh=False)]
    assert logprob == pytest.approx(lm.token_logprobs(whole)[-3:].sum(), abs=1e-9)
    answer = model.generate_until(
        requests("generate_until", (text, {"max_gen_toks": 9, "logit_bias": {END: 100}}))
    )
    assert answer == [""]  # the template's end of a turn ends an answer, too
    with pytest.raises(ValueError, match="begun in the prompt are not supported"):
        model.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)
    with pytest.raises(ValueError, match="has no chat template"):
        HarnessModel(threads=1).apply_chat_template([{"role": "user", "content": "a"}])


def test_the_command_runs_in_place_of_the_harness(data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "nomatmul.evaluate.harness", "--model", "nomatmul",
            "--model_args", "threads=1", "--include_path", str(TASKS), "--tasks",
            "local_openbook_qa", "--metadata", json.dumps({"data": str(data)}),
            "--output_path", str(tmp_path / "found"),
        ],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "found").rglob("results_*.json")
    assert json.loads(path.read_text())["n-samples"]["local_openbook_qa"]["effective"] == 3
