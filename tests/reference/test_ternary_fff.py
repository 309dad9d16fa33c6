"""The oracle's ternary FFF against the same layer written token by token, node by node."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from model_files import write_packed, write_training

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.trees import TernaryTrees, walk
from nomatmul.reference.weights import FloatWeights

UNION = {
    "vocab_size": 40,
    "hidden_size": 33,
    "num_layers": 2,
    "channel_mixer": "fff",
    "activation": "silu",
    "fff_trees": 3,
    "fff_depth": 2,
}


def random_fff(rng: np.random.Generator, size: int, trees: int, depth: int) -> TernaryTrees:
    rows = trees * (2 ** (depth + 1) - 1)
    t_in, t_out = rng.integers(-1, 2, (2, rows, size)).astype(np.int8)
    scales = rng.random(2).astype(np.float32)
    norms = [(1 + 0.3 * rng.standard_normal(n)).astype(np.float32) for n in (size, rows)]
    return TernaryTrees(trees, depth, "silu", t_in, t_out, scales, *norms, 1e-6)


def token_by_token(fff: TernaryTrees, x_D: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(visited rows, output in float64): the page's formulas, one number at a time."""
    y = x_D / np.sqrt(np.mean(x_D.astype(np.float64) ** 2) + fff.eps) * fff.norm_in_D
    step = np.abs(y).max() / 127
    q = [int(np.sign(v) * np.floor(abs(v) / step + 0.5)) for v in y]
    nodes, rows, logits = 2 ** (fff.depth + 1) - 1, [], []
    for tree in range(fff.trees):
        node = 0
        for _ in range(fff.depth + 1):
            row = tree * nodes + node
            acc = sum(a * int(t) for a, t in zip(q, fff.w_in_VD[row], strict=True))
            rows.append(row)
            logits.append(acc * float(fff.scales[0]) * step)
            node = 2 * node + (2 if acc > 0 else 1)
    h = np.array([v / (1 + np.exp(-v)) for v in logits])
    z = h / np.sqrt(np.mean(h**2) + fff.eps) * fff.norm_out_V[rows]
    step_h = np.abs(z).max() / 127
    q_h = np.sign(z) * np.floor(np.abs(z) / step_h + 0.5)
    return rows, (q_h @ fff.w_out_VD[rows]) * float(fff.scales[1]) * step_h


@pytest.mark.parametrize(("size", "trees", "depth"), [(33, 3, 2), (1, 1, 0), (20, 1, 5), (9, 7, 1)])
def test_it_is_the_walk_of_each_token(rng, size, trees, depth):
    fff = random_fff(rng, size, trees, depth)
    x_TD = rng.standard_normal((6, size)).astype(np.float32)
    out_TD, _, rows_TAL = fff(x_TD)
    rows_TA = rows_TAL.reshape(6, -1)
    for x_D, rows_A, out_D in zip(x_TD, rows_TA, out_TD, strict=True):
        rows, expected_D = token_by_token(fff, x_D)
        assert rows_A.tolist() == rows
        # one int8 value of float32 noise may flip: 1 of up to 127, of A values
        np.testing.assert_allclose(out_D, expected_D, atol=2e-2 * np.abs(expected_D).max() + 1e-6)


def visited(acc_NV: list[list[int]], trees: int, depth: int) -> list[list[int]]:
    """The rows of each token, tree by tree."""
    acc = np.array(acc_NV, np.int32)
    of_rows = functools.partial(np.take_along_axis, acc, axis=1)
    values, rows = walk(of_rows, len(acc), trees, depth)
    np.testing.assert_array_equal(values.reshape(len(acc), -1), of_rows(rows.reshape(len(acc), -1)))
    return rows.reshape(len(acc), -1).tolist()


def test_ties_go_left_and_signs_decide():
    acc_NV = [[0, 5, -3, 9, 9, 9, 9], [1, 5, -3, 9, 9, 9, 9], [-1, 0, 7, 9, 9, 9, 9]]
    assert visited(acc_NV, 1, 2) == [[0, 1, 4], [0, 2, 5], [0, 1, 3]]


def test_trees_lie_one_after_the_other():
    assert visited([[1, 0, 0, -1, 0, 0]], 2, 1) == [[0, 2, 3, 4]]


def test_groups_of_tokens_are_the_tokens(rng, monkeypatch):
    """Many trees are computed a few tokens at a time."""
    fff = random_fff(rng, 20, 4, 3)
    x_TD = rng.standard_normal((7, 20)).astype(np.float32)
    whole = fff(x_TD)
    monkeypatch.setattr("nomatmul.reference.trees._GATHERED", 3 * 4 * 20)
    for found, expected in zip(fff(x_TD), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_checkpoint_and_its_packed_form_are_one_model(tmp_path, rng):
    write_training(tmp_path / "source", ModelConfig(**UNION), rng)
    checkpoint = open_checkpoint(tmp_path / "source")
    write_packed(tmp_path / "packed", checkpoint, "1.6bit", "f32")
    packed = ReferenceModel.from_packed(PackedReader(tmp_path / "packed"))
    plain = ReferenceModel.from_checkpoint(checkpoint)
    ids = rng.integers(0, 40, (2, 9))
    np.testing.assert_array_equal(packed.forward(ids).logits_BTV, plain.forward(ids).logits_BTV)


@pytest.mark.parametrize("more", [{"fff_layers": (1,)}, {"fff_master_width": 5}])
def test_some_layers_and_the_master_leaf(tmp_path, rng, more):
    config = ModelConfig(**UNION, **more, intermediate_size=12)
    write_training(tmp_path, config, rng)
    read, ids = open_checkpoint(tmp_path).read, rng.integers(0, 40, (1, 5))
    found = ReferenceModel.load(tmp_path).forward(ids)
    assert list(found.paths) == ([1] if "fff_layers" in more else [0, 1])

    def without_master(name: str) -> np.ndarray:
        return read(name) * np.float32(name != "layers.1.channel.master.up_proj.weight")

    changed = ReferenceModel(config, FloatWeights(without_master)).forward(ids)
    same = np.array_equal(changed.logits_BTV, found.logits_BTV)
    assert same != ("fff_master_width" in more)  # what stands beside the trees counts


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"linear": "dense"}, "trees of dense rows"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"norm": "layer"}, "norm 'layer'"),
    ],
)
def test_what_it_does_not_compute_is_refused(tmp_path, rng, dials, message):
    write_training(tmp_path, ModelConfig(**{**UNION, **dials}), rng)
    with pytest.raises(ValueError, match=message):
        ReferenceModel.load(tmp_path)
