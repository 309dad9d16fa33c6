"""The encoder in the box: what a fresh install, without torch, does with it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import nomatmul
from nomatmul.engine.loading import ENCODER_BOX

STATES = "The president of the United [MASK] signed the law."
DOOR = "She opened the [MASK] and went into the house."


@pytest.fixture(scope="module")
def encoder() -> nomatmul.EncoderModel:
    return nomatmul.load(kind="encoder", threads=1)


def test_it_is_loaded_by_its_kind(encoder):
    assert encoder.path == ENCODER_BOX
    assert isinstance(encoder, nomatmul.EncoderModel)
    assert isinstance(nomatmul.load(threads=1), nomatmul.LanguageModel)  # as ever


def test_commands_without_a_model_and_without_torch():
    """Sure answers only: the last digits of a probability differ between machines."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from nomatmul import cli; sys.exit(cli.main(sys.argv[1:]))"
    )

    def run(*words: str) -> dict:
        command = [sys.executable, "-c", code, *words, "--threads", "1", "--json"]
        return json.loads(
            subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        )

    filled = run("fill-mask", STATES, "--top-k", "2")
    assert filled["model"] == str(ENCODER_BOX)
    ((first, second),) = filled["masks"]
    assert first["text"] == "the president of the united states signed the law."
    assert first["score"] > 0.8 > 2 * second["score"]
    found = run("embed", "a river", "an ocean")
    assert (found["texts"], found["dimension"], found["pooling"]) == (2, 256, "mean")


def test_it_guesses_from_both_sides(encoder):
    (before,) = encoder.fill_mask("She opened the [MASK].", top_k=100)
    (both,) = encoder.fill_mask(DOOR, top_k=100)

    def share(fillings: list[dict], word: str) -> float:
        return sum(f["score"] for f in fillings if f["token"] == word)

    assert both[0]["token"] == "door"
    assert share(both, "house") > 2 * share(before, "house")  # the right side has it


def test_texts_about_one_thing_are_nearer(encoder):
    texts = [
        "The ships sailed across the ocean.", "The boat left the harbour for the open sea.",
        "The king and the queen lived in a castle.", "The prince married the princess.",
        "He studied mathematics at the university.", "The professor taught the students physics.",
    ]  # fmt: skip
    vectors_BD = encoder.embed(texts, normalize=True)
    near_BB = vectors_BD @ vectors_BD.T - 2 * np.eye(len(texts))
    assert near_BB.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]


def test_what_it_cannot_do_is_said(run, encoder):
    done = run("fill-mask", "no gap here")
    assert done.status == 1
    assert "[MASK]" in done.err
    assert "given twice" in run("fill-mask", STATES, "--text", STATES).err
    assert "there is no text" in run("fill-mask").err
    done = run("classify", "--model", ENCODER_BOX, "a fine film")
    assert done.status == 1
    assert "nomatmul finetune" in done.err
    assert str(run("embed", "word " * 200).err).startswith("nomatmul: ")
