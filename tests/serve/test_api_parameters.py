"""What each parameter does: answers of the server are those of `lm.generate` with its options."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from nomatmul.engine.sampling import Sampling

BOX = "nomatmul-box"
PROMPT = "The river"
SEED = 7
TOKENS = 24


@pytest.fixture(scope="module")
def lm(server):
    return server.server.models[BOX].lm


@pytest.fixture(scope="module")
def complete(server):
    """The body of an answer of /v1/completions."""

    def ask(prompt=PROMPT, **fields):
        body = {"model": BOX, "prompt": prompt, "max_tokens": TOKENS, "seed": SEED, **fields}
        response = httpx.post(server.url + "/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return ask


def text(answer):
    (choice,) = answer["choices"]
    return choice["text"]


def generated(lm, prompt=PROMPT, stop=None, tokens=TOKENS, **options):
    sampling = Sampling(**{"temperature": 1.0, "seed": SEED, **options})
    return lm.generate(prompt, max_tokens=tokens, sampling=sampling, stop=stop)


@pytest.fixture(scope="module")
def usual(lm):
    return generated(lm)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.3},
        {"temperature": 2},
        {"top_p": 0.4},
        {"top_k": 2},
        {"min_p": 0.3},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"presence_penalty": -2},
        {"repetition_penalty": 1.5},
        {"seed": SEED + 1},
        {"seed": -(1 << 63)},
    ],
)
def test_sampling_does_what_the_engine_does(complete, lm, usual, fields):
    answer = text(complete(**fields))
    assert answer == generated(lm, **fields)
    assert answer != usual


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": -1},
        {"min_p": 0},
        {"presence_penalty": 0.0},
        {"n": 1},
        {"best_of": 1},
        {"stop": None},
        {"stop": []},
        {"stop": "no such text"},
        {"suffix": None},
        {"suffix": ""},
        {"logit_bias": {}},
        {"logit_bias": None},
        {"echo": False},
        {"user": "somebody"},
        {"stream": False},
        {"temperature": None, "top_p": None, "seed": SEED},
    ],
)
def test_these_change_nothing(complete, usual, fields):
    assert text(complete(**fields)) == usual


def test_a_request_without_a_seed_draws_one(complete):
    assert len({text(complete(seed=None)) for _ in range(4)}) > 1


@pytest.mark.parametrize("bias", [-100, -5, 20])
def test_a_bias_moves_a_token(complete, lm, bias):
    first = lm.tokenizer.encode(generated(lm, temperature=0), add_special_tokens=False).ids[0]
    answer = text(complete(temperature=0, logit_bias={str(first): bias}))
    assert answer == generated(lm, temperature=0, logit_bias={first: bias})
    assert answer != generated(lm, temperature=0)


def test_the_end_token_ends_with_stop(complete, lm):
    end = min(lm.config.end_token_ids)
    answer = complete(logit_bias={str(end): 100})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert text(answer) == ""
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(("count", "prompt"), [(1, PROMPT), (5, PROMPT)])
def test_max_tokens_ends_with_length(complete, lm, count, prompt):
    answer = complete(max_tokens=count)
    assert text(answer) == generated(lm, tokens=count)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == count


def test_sixteen_tokens_are_the_default(complete):
    assert complete(max_tokens=None)["usage"]["completion_tokens"] == 16


def test_no_tokens_may_be_asked_for(complete):
    answer = complete(max_tokens=0, echo=True)
    assert text(answer) == PROMPT
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_string_ends_before_itself(complete, lm, several):
    whole = generated(lm, temperature=0)
    stop = whole[5:9]  # begins and ends inside of words
    answer = complete(temperature=0, stop=["no such text", stop] if several else stop)
    assert text(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_choices_draw_with_seeds_in_a_row(complete, lm):
    answer = complete(n=3, best_of=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [generated(lm, seed=SEED + k) for k in range(3)]
    single = complete()["usage"]
    assert answer["usage"]["prompt_tokens"] == single["prompt_tokens"]
    assert answer["usage"]["total_tokens"] == sum(
        answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    )


def test_prompts_are_texts_or_ids_one_or_several(complete, lm, usual):
    ids, other = lm.prompt_ids(PROMPT), lm.prompt_ids("A city")
    for prompt in (PROMPT, [PROMPT], ids, [ids]):
        assert text(complete(prompt)) == usual
    for prompts in ([PROMPT, "A city"], [ids, other]):
        answer = complete(prompts, n=2)
        texts = [choice["text"] for choice in answer["choices"]]
        seeds = [(PROMPT, 0), (PROMPT, 1), ("A city", 2), ("A city", 3)]
        assert texts == [generated(lm, prompt, seed=SEED + k) for prompt, k in seeds]
        assert answer["usage"]["prompt_tokens"] == len(ids) + len(other)


def test_answers_do_not_depend_on_who_else_asks(complete):
    prompts = [PROMPT, "A city", PROMPT, "In the year 1900", "The", PROMPT]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: text(complete(prompt, n=1)), prompts))
    assert together == [text(complete(prompt)) for prompt in prompts]


def test_echo_repeats_the_prompt(complete, lm, usual):
    assert text(complete(echo=True)) == PROMPT + usual
    ids = lm.prompt_ids(PROMPT)
    assert text(complete(ids, echo=True)) == PROMPT + usual


def test_logprobs_are_those_of_the_model(complete, lm):
    answer = complete(logprobs=3, temperature=0.7, frequency_penalty=1)
    scores = answer["choices"][0]["logprobs"]
    assert "".join(scores["tokens"]) == text(answer)
    assert [text(answer)[start:] for start in scores["text_offset"]] == [
        "".join(scores["tokens"][at:]) for at in range(len(scores["tokens"]))
    ]
    ids = [*lm.prompt_ids(PROMPT), *made_ids(lm, temperature=0.7, frequency_penalty=1)]
    expected = lm.token_logprobs(ids)[len(lm.prompt_ids(PROMPT)) - 1 :]
    assert scores["token_logprobs"] == expected.tolist()
    for token, logprob, top in zip(
        scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4
        assert list(top.values())[:3] == sorted(top.values(), reverse=True)[:3]


def made_ids(lm, **options):
    sampling = Sampling(**{"temperature": 1.0, "seed": SEED, **options})
    return lm.generate_ids(lm.prompt_ids(PROMPT), max_tokens=TOKENS, sampling=sampling)


def test_no_alternatives_are_a_count_too(complete, usual):
    answer = complete(logprobs=0)
    assert text(answer) == usual
    scores = answer["choices"][0]["logprobs"]
    assert scores["top_logprobs"] is None
    assert len(scores["token_logprobs"]) == answer["usage"]["completion_tokens"]
    assert complete()["choices"][0]["logprobs"] is None


def test_echoed_logprobs_begin_with_the_prompt(complete, lm):
    ids = lm.prompt_ids(PROMPT)
    answer = complete(ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    scores = answer["choices"][0]["logprobs"]
    made = lm.generate_ids(ids, max_tokens=1)
    assert scores["token_logprobs"] == [None, *lm.token_logprobs([*ids, *made]).tolist()]
    assert scores["top_logprobs"][0] is None
    whole = answer["choices"][0]["text"]
    shown = [*scores["text_offset"][1:], len(whole)]
    pieces = [whole[a:b] for a, b in zip(scores["text_offset"], shown, strict=True)]
    assert "".join(pieces) == whole
    special = sum(token == lm.config.bos_token_id for token in ids)
    assert pieces[:special] == [""] * special
    assert pieces[special:] == scores["tokens"][special:]


def test_echo_alone_scores_the_prompt(complete, lm):
    ids = lm.prompt_ids("The river runs to the sea")
    answer = complete(ids, echo=True, logprobs=0, max_tokens=0)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [
        None,
        *lm.token_logprobs(ids).tolist(),
    ]


def test_answers_say_what_made_them(complete, lm, server):
    first, second = complete(), complete()
    assert first["object"] == "text_completion"
    assert first["model"] == BOX
    assert lm.fingerprint.startswith(first["system_fingerprint"].removeprefix("fp_"))
    assert first["id"] != second["id"]
    assert abs(first["created"] - time.time()) < 3600
    spent = first["nomatmul"]
    assert spent["cached_tokens"] + spent["computed_tokens"] == first["usage"]["prompt_tokens"]
    assert 0 <= spent["queue_s"] <= spent["first_token_s"] <= spent["total_s"]
