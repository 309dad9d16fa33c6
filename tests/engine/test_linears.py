"""Every form of linear, embedding and head in whole models: the oracle's logits, bit for bit, on
every instruction set, for any number of threads and any cut.

Legend: T tokens.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from engine_models import random_ids

from nomatmul.engine import LanguageModel, load, random_model
from nomatmul.engine.graph import describe, rearranged
from nomatmul.engine.native import native
from nomatmul.engine.random_weights import random_weights
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import Forms
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.formats.packed.writer import PackedWriter

BASE = {
    "vocab_size": 107, "hidden_size": 64, "num_layers": 2, "intermediate_size": 96,
    "token_mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "use_lower_bound": False,
}  # fmt: skip
TOKENS = 45

# name: (dials, forms)
MODELS = {
    "int8 a token, no norms": (
        {"linear_norm": "none", "rounding": "even", "split_gate": True, "head_linear": "dense"},
        {"head": "int8", "embedding": "bf16"},
    ),
    "sub-norms, tied int8 head": (
        {
            "linear_norm": "sub", "rounding": "even", "split_gate": True, "head_linear": "dense",
            "glu_activation": "relu2", "tie_embeddings": True,
        },
        {"embedding": "int8", "ternary": "1.6bit"},
    ),
    "rounding up, f16": (
        {"linear_norm": "none", "rounding": "up", "head_linear": "dense"},
        {"head": "f16", "embedding": "f16"},
    ),
    "groups of 32": (
        {"linear_norm": "none", "scale_group": 32, "head_linear": "dense"},
        {"head": "int8-32", "embedding": "int8-32", "scale": "f32"},
    ),
    "ternary embedding and head, tied": (
        {
            "linear_norm": "none", "scale_group": 32, "embedding_linear": "ternary",
            "tie_embeddings": True, "qk_norm": True,
        },
        {"scale": "f16", "ternary": "1.6bit"},
    ),
    "ternary embedding, ternary head": (
        {"linear_norm": "none", "scale_group": 32, "embedding_linear": "ternary"},
        {"scale": "f16"},
    ),
    "dense int8": ({"linear": "dense"}, {"dense": "int8", "head": "f32", "embedding": "f32"}),
    "dense, tied bf16": (
        {"linear": "dense", "tie_embeddings": True},
        {"dense": "bf16", "embedding": "bf16"},
    ),
    "dense int8-32, tied": (
        {"linear": "dense", "tie_embeddings": True},
        {"dense": "int8-32", "embedding": "int8-32", "scale": "f16"},
    ),
    "dense f16": ({"linear": "dense"}, {"dense": "f16", "head": "bf16", "embedding": "int8"}),
}  # fmt: skip


def forms_of(name: str) -> tuple[ModelConfig, Forms]:
    dials, forms = MODELS[name]
    config = ModelConfig(**(BASE | dials))
    return config, Forms.of(config, **forms)


@pytest.fixture(scope="module", params=list(MODELS))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory of random weights."""
    config, forms = forms_of(request.param)
    path = tmp_path_factory.mktemp("linears") / "model"
    weights = random_weights(config, forms, 7)
    with PackedWriter(path, config, forms) as writer:
        for name in writer.names:
            writer.add(name, weights.arrays[name])
    return path


def ids_of(config: ModelConfig) -> np.ndarray:
    return random_ids(TOKENS, config.vocab_size, 4)


def test_logits_are_the_oracles(packed: Path) -> None:
    ids = ids_of(PackedReader(packed).config)
    wanted = load(packed, backend="numpy").logits(ids)
    assert np.isfinite(wanted).all()
    assert wanted.std() > 1e-3
    for isa in native().kernels.isas():
        found = load(packed, isa=isa, threads=1).logits(ids)
        np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32), err_msg=isa)


def test_threads_cuts_and_batches_change_nothing(packed: Path) -> None:
    lm = load(packed, threads=3)
    ids = ids_of(lm.config)
    wanted = lm.logits(ids)
    for isa in native().kernels.isas():
        other = load(packed, isa=isa, threads=2, mmap=True)
        session = other.session()
        cuts = [0, 1, 3, 4, 9, 26, TOKENS]
        parts = [session.append(ids[a:b], "all") for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), wanted)
        sessions = [other.session() for _ in range(6)]
        rows = other.step(sessions, [ids[: 2 + 3 * i] for i in range(6)])
        np.testing.assert_array_equal(rows, wanted[[1 + 3 * i for i in range(6)]])


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_rearranged_is_in_the_file_and_not_kept(name: str) -> None:
    config, forms = forms_of(name)
    names = set(rearranged(describe(config, forms)))
    weights = random_weights(config, forms, 7, names)
    assert names <= set(weights.arrays)
    assert set(weights.arrays) == set(random_weights(config, forms, 7).arrays)
    in_place = {"rounding up, f16", "dense, tied bf16", "dense f16"}
    assert (not names) == (name in in_place)


def test_bytes_are_those_of_the_panels(packed: Path) -> None:
    parts = load(packed, threads=1).backend.weight_bytes()
    reader = PackedReader(packed)
    total = sum(info.nbytes for info in reader.infos.values())
    grouped = reader.config.scale_group > 0
    if grouped and reader.forms.ternary == "1.6bit":
        assert sum(parts.values()) < total  # five values a byte have padded rows of 160
    else:
        assert sum(parts.values()) <= total
    assert parts["embedding"] > 0


def test_random_models_have_heads_of_any_form() -> None:
    config, _ = forms_of("int8 a token, no norms")
    logits = {}
    for head in ("f32", "bf16", "f16", "int8", "int8-32"):
        lm = random_model(config, embedding="bf16", head=head, threads=1)
        assert isinstance(lm, LanguageModel)
        logits[head] = lm.logits([1, 2, 3])
        assert np.isfinite(logits[head]).all()
    with pytest.raises(ValueError, match="head form 'f8' is unknown"):
        random_model(config, head="f8")
