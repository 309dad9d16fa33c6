"""Several Python threads, forked processes, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from engine_models import random_ids, state_of

from nomatmul.engine import LanguageModel, load


def test_threads_may_share_a_model(lm: LanguageModel) -> None:
    parts = [random_ids(25, seed=seed) for seed in range(6)]
    expected = [lm.logits(part) for part in parts]
    found: list[list[np.ndarray]] = [[] for _ in parts]

    def work(index: int) -> None:
        for _ in range(4):
            session = lm.session()
            rows = [session.append(parts[index][:9], logits="all")]
            rows += [session.append([token])[None] for token in parts[index][9:]]
            found[index].append(np.concatenate(rows))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(parts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, rows in enumerate(found):
        assert len(rows) == 4
        for row in rows:
            np.testing.assert_array_equal(row, expected[index])


def test_threads_may_share_a_session(lm: LanguageModel) -> None:
    session = lm.session()
    workers = [
        threading.Thread(target=lambda: [session.append([7]) for _ in range(20)]) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert session.position == 80
    expected = lm.session()
    expected.append([7] * 80)
    np.testing.assert_array_equal(state_of(session), state_of(expected))


def test_steps_over_the_same_sessions_do_not_deadlock(lm: LanguageModel) -> None:
    one, two = lm.session(), lm.session()
    orders = [[one, two], [two, one]]
    workers = [
        threading.Thread(target=lambda o=order: [lm.step(o, [[1], [1]]) for _ in range(30)])
        for order in orders
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert one.position == two.position == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_goes_on(lm: LanguageModel) -> None:
    session = lm.session()
    session.append(random_ids(10))
    expected = session.fork().append([5, 6])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's lines are not seen by coverage
        try:
            signal.alarm(60)
            os.write(write, session.append([5, 6]).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert found == expected.tobytes()
    np.testing.assert_array_equal(session.append([5, 6]), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_during_a_step_of_another_thread_does_not_hang(lm: LanguageModel) -> None:
    stop = threading.Event()

    def busy() -> None:
        session = lm.session()
        while not stop.is_set():
            session.append(random_ids(40))

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:  # pragma: no cover
                signal.alarm(60)
                lm.session().append([1, 2, 3])
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        worker.join()


def test_ctrl_c_stops_a_long_step(tmp_path: Path) -> None:
    code = """
import os, signal, sys, threading
import numpy as np
from nomatmul.engine import random_model
from nomatmul.formats.config import ModelConfig

config = ModelConfig(vocab_size=64, hidden_size=256, num_layers=8)
lm = random_model(config, isa="scalar", threads=1)
state_of = lambda session: np.stack(list(session.arrays().values()))
session = lm.session()
session.append([1])
before = state_of(session)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    session.append(np.ones(200_000, np.int32))
except KeyboardInterrupt:
    assert session.position == 1 and np.array_equal(state_of(session), before)
    print("stopped")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "stopped\n", done.stderr


def test_threads_that_write_texts_disturb_nobody(text_lm: LanguageModel) -> None:
    prompts = [f"The {word} " for word in ("otter", "kiln", "birch", "anchor")]
    drawn = {"max_tokens": 12, "temperature": 0.9, "seed": 2}
    expected = {prompt: text_lm.generate(prompt, **drawn) for prompt in prompts}
    fresh = load(text_lm.path, threads=2)  # its tokenizer is loaded by whoever comes first
    wrong: list[str] = []

    def write(prompt: str) -> None:
        for _ in range(4):
            session = fresh.session()
            texts = [
                fresh.generate(prompt, **drawn),
                fresh.generate([prompt, "x"], **drawn)[0],
                "".join(fresh.stream(prompt, session=session, **drawn)),
            ]
            wrong.extend(text for text in texts if text != expected[prompt])

    workers = [threading.Thread(target=write, args=(prompt,)) for prompt in prompts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert not wrong
