"""The threads that an encoder's steps and its trees share: other callers, and forked children."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from encoder_files import TREES, encoder_config, write_encoder

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
