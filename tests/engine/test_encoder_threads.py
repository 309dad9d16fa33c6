"""The threads that an encoder's steps and its trees share: other callers, and forked children."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
from encoder_files import TREES, encoder_config, write_encoder, write_word_piece

import nomatmul
from nomatmul.convert import pack

IDS = np.random.default_rng(3).integers(0, 32, (40, 20))  # enough tokens for several tasks


@pytest.fixture
def model(tmp_path):
    write_encoder(tmp_path / "source", encoder_config(**TREES))
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    return nomatmul.load(tmp_path / "packed", threads=2)


def test_models_that_compute_at_the_same_time_do_not_disturb_each_other(model):
    others = [nomatmul.load(model.path, threads=threads) for threads in (1, 2, 2, 3)]
    expected, found = model.hidden(IDS), {}

    def compute(number: int) -> None:
        found[number] = [others[number].hidden(IDS) for _ in range(5)]

    workers = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(found) == 4
    for results in found.values():
        for result in results:
            np.testing.assert_array_equal(result, expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_though_the_threads_are_not_there(model):
    expected = model.hidden(IDS)  # the threads exist from here on
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same = np.array_equal(model.hidden(IDS), expected)
            os.write(writer, b"same" if same else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"same"
    os.waitpid(child, 0)


def test_calls_of_every_kind_at_the_same_time_give_what_they_give_alone(tmp_path):
    write_encoder(tmp_path / "source", encoder_config(**TREES))
    write_word_piece(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    model = nomatmul.load(tmp_path / "packed", threads=1)
    spelt, long = "the [MASK] [SEP] river flows", "a river [MASK] " * 30
    calls = [
        lambda: model.fill_mask("the [MASK] of stone"),
        lambda: model.embed(spelt).tolist(),
        lambda: model.embed([long, spelt], truncate=True).tolist(),
        lambda: model.embed(("a river", spelt)).tolist(),
    ]
    expected = [call() for call in calls]
    wrong, interval = [], sys.getswitchinterval()

    def ask(number: int) -> None:
        for _ in range(60):
            try:
                if calls[number]() != expected[number]:
                    wrong.append(number)
            except ValueError as error:
                wrong.append(str(error))

    workers = [threading.Thread(target=ask, args=(number % 4,)) for number in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
