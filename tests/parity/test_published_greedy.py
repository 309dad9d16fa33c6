"""Greedy text of packed published models in the engine, beside transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import published_torch as published

import nomatmul
from nomatmul.convert import pack

PROMPT, NEW = 16, 24
KINDS = (
    "packed",
    "unpacked",
    "legacy_llama",
    "legacy_with_norms",
    "groups",
    "tied_groups",
    "qwen3",
)


@pytest.fixture(autouse=True)
def plain_torch():
    """transformers compiles small functions of its BitLinear: not here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forms", [{}, {"head": "float32"}], ids=["default", "float head"])
@pytest.mark.filterwarnings("ignore:the head is ternary")
def test_texts_part_at_a_near_tie_only(tmp_path, rng, kind, forms):
    """Where they part, the best two of transformers' logits are less than twice the error apart."""
    directory = published.ONE_BY_ONE[kind](tmp_path, rng)
    pack(directory, tmp_path / "greedy", check=False, **forms)
    lm, theirs = nomatmul.load(tmp_path / "greedy"), published.transformers_model(directory)
    prompt = published.ids_of(rng)[:1, :PROMPT]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(torch.from_numpy(prompt), **options)[0].numpy()
    session, ids = lm.session(), list(prompt[0])
    logits = session.append(ids)
    for _ in range(NEW):
        ids.append(int(logits.argmax()))
        logits = session.append(ids[-1:])
    same = np.array(ids) == expected
    if same.all():
        return
    at = int(np.flatnonzero(~same)[0])
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(expected[None, :at])).logits[0].numpy()
    second, first = np.sort(wanted[-1])[-2:]
    error = np.abs(lm.logits(expected[:at]) - wanted).max()
    print(f"{kind}: token {at - PROMPT} of {NEW}: margin {first - second:.4f}, error {error:.4f}")
    assert first - second < 2 * error
