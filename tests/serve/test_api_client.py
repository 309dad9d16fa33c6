"""OpenAI's own client, against the box model and a tiny model with attention and a template."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import openai
import pytest
from chat_models import ATTENTION, END, chat_model
from chat_templates import CHATML
from support.serving import running_server

from nomatmul.engine.sampling import Sampling
from nomatmul.serve.models import served_model

BOX = "nomatmul-box"
TINY = "tiny"  # 512 positions, a token a byte
USER = {"role": "user", "content": "The river"}
SEED = 11


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def lm(server):
    return server.server.models[BOX].lm


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    model = served_model(TINY, chat_model(directory, ATTENTION, CHATML), directory)
    with running_server(models={TINY: model}) as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tiny_server):
    url = tiny_server.url + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def chat(client, model=BOX, messages=(USER,), **options):
    options = {"max_completion_tokens": 20, "seed": SEED, **options}
    return client.chat.completions.create(model=model, messages=list(messages), **options)


def test_a_chat_answers_as_the_engine_does(client, lm):
    answer = chat(client)
    choice = answer.choices[0]
    sampling = Sampling(temperature=1.0, seed=SEED)
    assert choice.message.content == lm.generate("The river", max_tokens=20, sampling=sampling)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens == len(lm.prompt_ids("The river"))
    assert answer.usage.total_tokens == 20 + answer.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens


def test_both_names_of_the_maximum_are_known(client):
    new = chat(client, max_completion_tokens=3).choices[0]
    old = chat(client, max_completion_tokens=openai.NOT_GIVEN, max_tokens=3).choices[0]
    assert new.message.content == old.message.content


def test_a_chat_is_streamed(client):
    whole = chat(client, n=2)
    texts, reasons = ["", ""], [None, None]
    with chat(client, n=2, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            assert chunk.object == "chat.completion.chunk"
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_clients_own_helper_reads_a_stream(client):
    options = {"temperature": 0, "stop": " of"}
    with client.chat.completions.stream(model=BOX, messages=[USER], **options) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    whole = chat(client, **options).choices[0]
    assert final.choices[0].message.content == whole.message.content


def test_the_async_client_works_as_well(server, client):
    async def ask():
        url = server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as other:
            whole = await chat(other)
            text = await other.completions.create(
                model=BOX, prompt="The river", max_tokens=20, seed=SEED
            )
            parts = [chunk async for chunk in await chat(other, stream=True)]
        streamed = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
        return whole.choices[0].message.content, text.choices[0].text, streamed

    assert len({*asyncio.run(ask()), chat(client).choices[0].message.content}) == 1


def test_chat_logprobs_are_those_of_completions(client):
    text = client.completions.create(
        model=BOX, prompt="The river", max_tokens=20, seed=SEED, logprobs=2
    ).choices[0]
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert [one.logprob for one in content] == text.logprobs.token_logprobs
    assert b"".join(bytes(one.bytes) for one in content).decode() == choice.message.content
    assert all(len(one.top_logprobs) == 2 for one in content)
    alone = chat(client, logprobs=True).choices[0].logprobs.content
    assert [one.logprob for one in alone] == [one.logprob for one in content]
    assert all(one.top_logprobs == [] for one in alone)


def test_pieces_of_characters_have_their_bytes(tiny):
    answer = chat(tiny, TINY, temperature=2, logprobs=True, top_logprobs=3, n=8)
    pieces = 0
    for choice in answer.choices:
        for one in choice.logprobs.content:
            for shown in (one, *one.top_logprobs):
                if shown.token.startswith("bytes:"):
                    pieces += 1
                    assert shown.token == "bytes:" + "".join(f"\\x{b:02x}" for b in shown.bytes)
                elif shown.bytes is not None:
                    assert bytes(shown.bytes).decode() == shown.token
    assert pieces


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "The river"}]}],
        [{"role": "user", "content": "The river", "name": "somebody"}],
    ],
)
def test_these_are_the_same_message(client, messages):
    expected = chat(client).choices[0].message.content
    assert chat(client, messages=messages).choices[0].message.content == expected


def test_parts_are_lines_of_one_text(client):
    parts = [{"type": "text", "text": text} for text in ("The river", "A city")]
    split = chat(client, messages=[{"role": "user", "content": parts}])
    whole = chat(client, messages=[{"role": "user", "content": "The river\nA city"}])
    assert split.choices[0].message.content == whole.choices[0].message.content


def test_a_developer_is_a_system(tiny):
    texts = [
        chat(tiny, TINY, [{"role": role, "content": "Be brief."}, USER]).choices[0].message.content
        for role in ("developer", "system", "user")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_may_be_sent_back_as_it_came(client, tiny):
    for one, model in ((client, BOX), (tiny, TINY)):
        answer = chat(one, model)
        messages = [USER, answer.choices[0].message, {"role": "user", "content": "And then?"}]
        again = chat(one, model, messages)
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_templates_read_their_options(tmp_path):
    template = "{{ word }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = served_model(TINY, chat_model(tmp_path, ATTENTION, template), tmp_path)
    with running_server(models={TINY: model}) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none")
        plain = chat(client, TINY).usage.prompt_tokens
        options = {"chat_template_kwargs": {"word": "abc"}}
        assert chat(client, TINY, extra_body=options).usage.prompt_tokens == plain + 3


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "self"])
def test_options_of_templates_replace_nothing(client, tiny, name):
    for one, model in ((client, BOX), (tiny, TINY)):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(one, model, extra_body={"chat_template_kwargs": {name: []}})
        assert name in caught.value.message
        assert caught.value.param == "chat_template_kwargs"


def test_generation_config_decides_where_a_request_says_nothing(tmp_path):
    lm = chat_model(tmp_path, ATTENTION, CHATML)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 3}')
    model = served_model(TINY, lm, tmp_path)
    with running_server(models={TINY: model}) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none")

        def made(**options):
            options = {"max_tokens": 20, "seed": SEED, **options}
            answer = client.completions.create(model=TINY, prompt="The river", **options)
            return answer.choices[0].text

        def expected(**options):
            sampling = Sampling(seed=SEED, **options)
            return lm.generate("The river", max_tokens=20, sampling=sampling)

        assert made() == expected(temperature=0.5, top_k=3)
        assert made(temperature=1) == expected(temperature=1.0, top_k=3)
        assert made(extra_body={"top_k": 0}) == expected(temperature=0.5)


def context_error(call):
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message
    return caught.value


def test_what_exceeds_the_context_is_refused(tiny):
    def complete(length, **options):
        return tiny.completions.create(model=TINY, prompt="x" * length, **options)

    exact = complete(500, max_tokens=11, extra_body={"logit_bias": no_end()})  # and a bos token
    assert exact.usage.total_tokens == 512
    error = context_error(lambda: complete(500, max_tokens=12))
    assert error.param == "max_tokens"
    assert "501" in error.message
    assert "12" in error.message
    error = context_error(lambda: complete(600))
    assert error.param == "prompt"
    assert "601" in error.message
    long = [{"role": "user", "content": "x" * 600}]
    assert context_error(lambda: chat(tiny, TINY, long)).param == "messages"
    error = context_error(lambda: chat(tiny, TINY, max_completion_tokens=510))
    assert error.param == "max_completion_tokens"


def no_end():
    return {str(end): -100 for end in ATTENTION.end_token_ids}


def test_without_a_maximum_there_is_what_the_context_leaves(tiny):
    answer = chat(
        tiny, TINY, max_completion_tokens=openai.NOT_GIVEN, logit_bias={**no_end(), "258": -100}
    )
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(client, stream):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "gpt-4", stream=stream)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=3, stream=stream)
    assert caught.value.param == "temperature"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [BOX]
    assert client.models.retrieve(BOX).object == "model"


def test_others_are_answered_while_a_long_prompt_is_read(server):
    """Tokenising takes a second, in which the event loop is free; then comes a refusal."""
    body = {"model": BOX, "prompt": ["The river runs. " * 60_000, ""]}
    over = threading.Event()
    found = []

    def send():
        found.append(httpx.post(server.url + "/v1/completions", json=body, timeout=120))
        over.set()

    thread = threading.Thread(target=send)
    start = time.monotonic()
    thread.start()
    waits = []
    with httpx.Client(timeout=120) as other:
        while not over.is_set():
            asked = time.monotonic()
            other.get(server.url + "/v1/models").raise_for_status()
            waits.append(time.monotonic() - asked)
    thread.join()
    assert found[0].json()["error"]["param"] == "prompt[1]"
    assert len(waits) > 5
    assert max(waits) < (time.monotonic() - start) / 2


def test_the_end_of_a_chats_turn_ends_no_completion(tiny):
    bias = {str(END): 100}
    answer = chat(tiny, TINY, logit_bias=bias)
    assert answer.choices[0].finish_reason == "stop"
    answer = tiny.completions.create(model=TINY, prompt="The", max_tokens=4, logit_bias=bias)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
