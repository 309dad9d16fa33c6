"""What `generate`, `stream` and `generate_ids` promise: ends, ids, batches, words."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG
from model_files import write_packed, write_published, write_tokenizer

import nomatmul
from nomatmul.convert import pack
from nomatmul.engine import LanguageModel, Sampler, Sampling, TextStream, load, random_model
from nomatmul.engine.generation import Generation, TextGeneration
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig

GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 1.0, "seed": 3}


def _model(
    directory: Path, backend: str | None = None, words: int = 40, **options
) -> LanguageModel:
    """A published checkpoint of 48 ids, of which the tokenizer names `words`, packed and loaded."""
    write_published(directory / "source", np.random.default_rng(5), **options)
    write_tokenizer(directory / "source", words)
    pack(directory / "source", directory / "packed", check=False)
    return load(directory / "packed", threads=1, backend=backend)


# -- end tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [4, 9, 11])
def test_each_end_token_ends_a_text_wherever_it_was_listed(tmp_path: Path, end: int) -> None:
    write_published(tmp_path, np.random.default_rng(1), eos_token_id=[4, 9])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    write_tokenizer(tmp_path)
    pack(tmp_path, tmp_path / "packed", check=False)
    lm = load(tmp_path / "packed", threads=1)
    assert lm.config.end_token_ids == (4, 9, 11)
    made = TextStream(lm.tokenizer, [], (i for i in [7, end, 8]), (), lm.config.end_token_ids)
    assert ("".join(made), made.finish_reason, made.token_ids) == ("w7", "end", [7])


def test_every_way_to_write_stops_at_a_late_end_token(tmp_path: Path) -> None:
    free = _model(tmp_path / "free", eos_token_id=None, bos_token_id=None)
    ids = free.generate_ids([1, 2], max_tokens=12, **DRAWN)
    end = ids[4]
    first = ids.index(end)
    unused = next(i for i in range(40) if i not in ids)
    lm = _model(tmp_path / "ends", eos_token_id=[unused, end], bos_token_id=None)
    text = free.tokenizer.decode([1, 2, *ids[:first]])[len(free.tokenizer.decode([1, 2])) :]
    stream = lm.stream([1, 2], max_tokens=12, **DRAWN)
    assert "".join(stream) == text
    assert stream.finish_reason == "end"
    assert lm.generate([1, 2], max_tokens=12, **DRAWN) == text
    assert lm.generate([[1, 2], [1, 2]], max_tokens=12, **DRAWN) == [text, text]
    assert lm.generate_ids([1, 2], max_tokens=12, **DRAWN) == ids[: first + 1]


def test_one_end_token_is_written_as_before() -> None:
    one = ModelConfig(**{**CONFIG.to_dict(), "eos_token_id": [7]})
    assert one.to_dict()["eos_token_id"] == 7
    two = ModelConfig(**{**CONFIG.to_dict(), "eos_token_id": [7, 3, 7]})
    assert ModelConfig.from_dict(json.loads(json.dumps(two.to_dict()))) == two
    assert two.end_token_ids == (7, 3)
    with pytest.raises(ValueError, match=r"a token in eos_token_id: 301 is out of range"):
        ModelConfig(**{**CONFIG.to_dict(), "eos_token_id": [7, 301]})


@pytest.mark.train
def test_torch_stops_at_each_end_token(tmp_path: Path) -> None:
    import torch

    from nomatmul.models import CausalLM

    write_published(tmp_path, np.random.default_rng(1), eos_token_id=None)
    model = CausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[7, 8]])
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    end, unused = free[4], next(i for i in range(40) if i not in free)
    write_published(tmp_path, np.random.default_rng(1), eos_token_id=[unused, end])
    stopped = CausalLM.from_pretrained(tmp_path).generate(ids, max_new_tokens=8, do_sample=False)
    assert stopped[0].tolist() == free[: 2 + free[2:].index(end) + 1]


# -- ids without a token --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        DRAWN,
        {**DRAWN, "top_k": 47},
        {**DRAWN, "top_p": 0.9},
        {**DRAWN, "min_p": 0.01},
        {"repetition_penalty": 1.4},
    ],
)
def test_ids_without_a_token_are_never_chosen(tmp_path: Path, backend: str, options: dict) -> None:
    lm = _model(tmp_path, backend, words=6, bos_token_id=None, eos_token_id=None)
    stream = lm.stream("w1 w2", max_tokens=40, **options)
    words = "".join(stream).split()
    assert len(words) == len(stream.token_ids) == 40
    assert max(stream.token_ids) < 6
    assert max(lm.generate_ids([1, 2], max_tokens=40, **options)) < 6


def test_an_end_token_without_a_name_still_ends_a_text(tmp_path: Path) -> None:
    free = _model(tmp_path / "a", words=6, bos_token_id=None, eos_token_id=None)
    # the likeliest of all ids from the first step on, so it must be taken
    end = int(free.logits([1, 2])[-1].argmax())
    assert end >= 6
    lm = _model(tmp_path / "b", words=6, bos_token_id=None, eos_token_id=end)
    stream = lm.stream([1, 2], max_tokens=5)
    assert ("".join(stream), stream.finish_reason) == ("", "end")


def test_without_a_tokenizer_every_id_may_come() -> None:
    lm = random_model(CONFIG, threads=1)
    made = lm.generate_ids([1, 2], max_tokens=6)
    assert made == lm.logits([1, 2, *made])[1:-1].argmax(axis=1).tolist()


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, {**DRAWN, "stop": "e"}, {**DRAWN, "top_p": 0.8}])
def test_each_text_of_a_batch_equals_its_single_run(text_lm: LanguageModel, options: dict) -> None:
    prompts = [f"{'the otter ' * (at % 4)}swam {at}" for at in range(19)]  # more than go together
    together = text_lm.generate(prompts, max_tokens=9, **options)
    assert together == [text_lm.generate(prompt, max_tokens=9, **options) for prompt in prompts]
    assert text_lm.generate([[65, 66], "ab"], max_tokens=4, **options) == [
        text_lm.generate([65, 66], max_tokens=4, **options),
        text_lm.generate("ab", max_tokens=4, **options),
    ]
    assert text_lm.generate(["a", "b"], max_tokens=0) == ["", ""]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.generate(["a", ""]), "prompt 1: the prompt is empty"),
        (lambda lm: lm.generate(["a", 3]), "prompt 1: .*whole numbers"),
        (lambda lm: lm.generate(["a"], session=lm.session()), "a session goes on from one prompt"),
        (lambda lm: lm.stream(["a", "b"]), "stream takes one prompt; generate takes a list"),
        (lambda lm: lm.generate([]), "the prompt is empty"),
        (lambda lm: lm.generate("a", max_new_tokens=3), "generate has no option.*use max_tokens"),
        (lambda lm: lm.stream("a", do_sample=True), "stream has no option 'do_sample'; use temp"),
        (
            lambda lm: lm.generate_ids([1], stop="x"),
            "generate_ids has no option 'stop'; use one of",
        ),
    ],
)
def test_what_is_refused_and_in_which_words(
    text_lm: LanguageModel, call: Callable, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(text_lm)


# -- what a user sees -----------------------------------------------------------------------------


def test_help_names_the_options() -> None:
    for method in (LanguageModel.generate, LanguageModel.stream, LanguageModel.generate_ids):
        options = inspect.signature(method).parameters
        assert {"max_tokens", "temperature", "top_p", "seed"} <= set(options)
    for option in ("max_tokens", "temperature", "top_k", "min_p", "seed", "stop", "session"):
        assert f"{option}:" in (LanguageModel.generate.__doc__ or "")


def test_models_and_sessions_say_what_they_are(text_lm: LanguageModel) -> None:
    assert str(text_lm.path) in repr(text_lm)
    assert f"{text_lm.config.param_count():,} parameters" in repr(text_lm)
    session = text_lm.session()
    session.append([1, 2, 3])
    assert "3 tokens" in repr(session)
    assert nomatmul.load is load


def test_an_interrupted_step_keeps_what_was_written(
    text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = text_lm.session()
    stream = text_lm.stream("Hello", max_tokens=20, session=session)
    pieces = [next(stream) for _ in range(3)]
    step = text_lm.backend.step

    def interrupted(*arguments):
        monkeypatch.setattr(text_lm.backend, "step", step)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_lm.backend, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert session.position == len(stream.prompt_ids) + len(stream.token_ids)
    assert pieces


def test_a_checkpoint_without_tokenizer_writes_no_text(tmp_path: Path) -> None:
    write_published(tmp_path / "source", np.random.default_rng(0))
    write_packed(tmp_path / "packed", open_checkpoint(tmp_path / "source"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(tmp_path / "packed", threads=1).generate(["a", "b"])


def test_sampling_may_be_given_whole(text_lm: LanguageModel) -> None:
    sampling = Sampling(**DRAWN)
    for method in (text_lm.generate, lambda *a, **o: "".join(text_lm.stream(*a, **o))):
        expected = method("Hello", max_tokens=9, **DRAWN)
        assert method("Hello", max_tokens=9, sampling=sampling) == expected
    ids = text_lm.generate_ids([65, 66], max_tokens=9, sampling=sampling)
    assert ids == text_lm.generate_ids([65, 66], max_tokens=9, **DRAWN)
    with pytest.raises(ValueError, match="give sampling, or temperature and the like, not both"):
        text_lm.generate("Hello", sampling=sampling, top_k=3)
    with pytest.raises(ValueError, match="sampling must be a Sampling, got dict"):
        text_lm.stream("Hello", sampling=DRAWN)


def test_any_driver_may_step_the_texts(text_lm: LanguageModel) -> None:
    """A server's loop: texts come and go while others are written, all in one step."""
    sampling, prompts = Sampling(**DRAWN), ["Hello", "A longer prompt", [65, 66, 67], "x"]
    counts = [5, 9, 1, 3]
    texts = [
        text_lm.text_generation(prompt, count, sampling)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    written, sessions, round_number = [""] * 4, {}, 0
    while any(text.needs for text in texts):
        for number in range(min(4, 1 + round_number // 2)):  # a new one every second round
            sessions.setdefault(number, text_lm.session())
        live = [number for number in sessions if texts[number].needs]
        rows = text_lm.step([sessions[n] for n in live], [texts[n].needs for n in live])
        for number, logits_V in zip(live, rows, strict=True):
            written[number] += texts[number].take(logits_V)
        round_number += 1
        assert round_number < 30
    for prompt, count, text, found in zip(prompts, counts, texts, written, strict=True):
        assert found == text_lm.generate(prompt, max_tokens=count, **DRAWN)
        assert text.writer.finish_reason in ("length", "end")
    assert text_lm.text_generation("Hello", 0, sampling).needs == []


def test_a_generation_owes_a_session_what_it_made(text_lm: LanguageModel) -> None:
    prompt = [65, 66]
    generation = Generation(prompt, 2, Sampler(Sampling(), prompt))
    assert (generation.needs, generation.unseen) == (prompt, [])  # a prompt is not owed
    logits_V = text_lm.session().append(prompt)
    with pytest.raises(ValueError, match="not finite"):
        generation.take(logits_V * np.float32("nan"))
    assert (generation.needs, generation.unseen) == ([], [])  # the model has seen the prompt
    generation = Generation(prompt, 2, Sampler(Sampling(), prompt))
    first = generation.take(logits_V)
    assert (generation.needs, generation.unseen) == ([first], [first])
    last = generation.take(logits_V)
    assert (generation.needs, generation.unseen) == ([], [last])
    assert Generation(prompt, 0, Sampler(Sampling(), prompt)).unseen == prompt


# -- what a server asks of a text -----------------------------------------------------------------


class Spelling:
    """A matcher of one word: its letters in order, then nothing."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self.ids, self.vocab_size, self.accepted = ids, vocab_size, []

    @property
    def done(self) -> bool:
        return len(self.accepted) == len(self.ids)

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.vocab_size, bool)
        mask[self.ids[len(self.accepted)]] = True
        return mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def _run(lm: LanguageModel, text: TextGeneration) -> str:
    session, pieces = lm.session(), []
    while text.needs:
        pieces.append(text.take(session.append(text.needs)))
    return "".join(pieces)


@pytest.mark.parametrize(
    ("count", "stop", "expected"),
    [
        (9, None, ("otter", "grammar")),
        (3, None, ("ott", "length")),
        (9, "te", ("ot", "stop")),
    ],
)
def test_a_matcher_binds_a_text_and_ends_it(
    text_lm: LanguageModel, count: int, stop: str | None, expected: tuple[str, str]
) -> None:
    ids = text_lm.prompt_ids("otter")
    matcher = Spelling(ids, text_lm.config.vocab_size)
    text = text_lm.text_generation("An ", count, Sampling(**DRAWN), stop, matcher=matcher)
    assert (_run(text_lm, text), text.finish_reason) == expected
    assert text.token == text.writer.token_ids[-1]
    assert text.unseen == [text.token]  # the last one was made and not fed


def test_an_end_token_of_a_matcher_is_not_accepted(text_lm: LanguageModel) -> None:
    """Its text may end before it must."""
    matcher = Spelling([*text_lm.prompt_ids("ab"), 7, 8], text_lm.config.vocab_size)
    text = text_lm.text_generation("x", 9, Sampling(), end_tokens=[7], matcher=matcher)
    assert (_run(text_lm, text), text.finish_reason) == ("ab", "end")
    assert (text.token, text.writer.end_token, text.unseen) == (7, 7, [7])
    assert matcher.accepted == text_lm.prompt_ids("ab")


def test_further_end_tokens_end_a_text_as_they_end_a_stream(text_lm: LanguageModel) -> None:
    free = text_lm.stream("Hello", max_tokens=9, **DRAWN)
    list(free)
    end = free.token_ids[3]
    stream = text_lm.stream("Hello", max_tokens=9, end_tokens=[end], **DRAWN)
    text = text_lm.text_generation("Hello", 9, Sampling(**DRAWN), end_tokens=[end])
    assert _run(text_lm, text) == "".join(stream)
    assert (text.finish_reason, text.writer.token_ids) == ("end", stream.token_ids)


def test_biases_hold_for_every_way_to_write(text_lm: LanguageModel) -> None:
    sampling = Sampling(logit_bias={65: 100}, presence_penalty=2, frequency_penalty=2)
    assert text_lm.generate_ids([70], max_tokens=4, sampling=sampling) == [65] * 4
    assert text_lm.generate("x", max_tokens=4, sampling=sampling) == text_lm.tokenizer.decode(
        [65] * 4
    )
    size = text_lm.config.vocab_size
    outside = Sampling(logit_bias={size: 1})
    message = f"logit_bias names token id {size}: this model has ids 0 to {size - 1}"
    for method in (text_lm.generate, text_lm.stream):
        with pytest.raises(ValueError, match=message):
            method("x", sampling=outside)
    with pytest.raises(ValueError, match=message):
        text_lm.generate_ids([70], sampling=outside)
    with pytest.raises(ValueError, match="use sampling=Sampling\\(presence_penalty="):
        text_lm.generate("x", presence_penalty=1)
