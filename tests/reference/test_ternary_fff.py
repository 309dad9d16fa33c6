"""The oracle's ternary FFF against the same layer written token by token, node by node."""

from __future__ import annotations

import numpy as np
import pytest
from model_files import write_packed, write_training

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.ternary_fff import TernaryFFF, walk_trees

UNION = {
    "vocab_size": 40,
    "hidden_size": 33,
    "num_layers": 2,
    "channel_mixer": "fff",
    "activation": "silu",
    "fff_trees": 3,
    "fff_depth": 2,
}


def random_fff(rng: np.random.Generator, size: int, trees: int, depth: int) -> TernaryFFF:
    rows = trees * (2 ** (depth + 1) - 1)
    t_in, t_out = rng.integers(-1, 2, (2, rows, size)).astype(np.int8)
    scales = rng.random(2).astype(np.float32)
    norms = [(1 + 0.3 * rng.standard_normal(n)).astype(np.float32) for n in (size, rows)]
    return TernaryFFF(t_in, t_out, scales, *norms, trees, depth, 1e-6)


def token_by_token(fff: TernaryFFF, x_D: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(visited rows, output in float64): the page's formulas, one number at a time."""
    y = x_D / np.sqrt(np.mean(x_D.astype(np.float64) ** 2) + fff.eps) * fff.norm_in_D
    step = np.abs(y).max() / 127
    q = [int(np.sign(v) * np.floor(abs(v) / step + 0.5)) for v in y]
    nodes, rows, logits = 2 ** (fff.depth + 1) - 1, [], []
    for tree in range(fff.trees):
        node = 0
        for _ in range(fff.depth + 1):
            row = tree * nodes + node
            acc = sum(a * int(t) for a, t in zip(q, fff.t_in_VD[row], strict=True))
            rows.append(row)
            logits.append(acc * float(fff.scales[0]) * step)
            node = 2 * node + (2 if acc > 0 else 1)
    h = np.array([v / (1 + np.exp(-v)) for v in logits])
    z = h / np.sqrt(np.mean(h**2) + fff.eps) * fff.norm_out_V[rows]
    step_h = np.abs(z).max() / 127
    q_h = np.sign(z) * np.floor(np.abs(z) / step_h + 0.5)
    return rows, (q_h @ fff.t_out_VD[rows]) * float(fff.scales[1]) * step_h


@pytest.mark.parametrize(("size", "trees", "depth"), [(33, 3, 2), (1, 1, 0), (20, 1, 5), (9, 7, 1)])
def test_it_is_the_walk_of_each_token(rng, size, trees, depth):
    fff = random_fff(rng, size, trees, depth)
    x_TD = rng.standard_normal((6, size)).astype(np.float32)
    rows_TA, _ = fff.walk(fff.quantised_input(x_TD)[0])
    out_TD = fff(x_TD)
    for x_D, rows_A, out_D in zip(x_TD, rows_TA, out_TD, strict=True):
        rows, expected_D = token_by_token(fff, x_D)
        assert rows_A.tolist() == rows
        # one int8 value of float32 noise may flip: 1 of up to 127, of A values
        np.testing.assert_allclose(out_D, expected_D, atol=2e-2 * np.abs(expected_D).max() + 1e-6)


def test_ties_go_left_and_signs_decide():
    acc_V = np.array([[0, 5, -3, 9, 9, 9, 9], [1, 5, -3, 9, 9, 9, 9], [-1, 0, 7, 9, 9, 9, 9]])
    rows = walk_trees(acc_V.astype(np.int32), 1, 2)
    assert rows.tolist() == [[0, 1, 4], [0, 2, 5], [0, 1, 3]]


def test_trees_lie_one_after_the_other():
    acc_V = np.array([1, 0, 0, -1, 0, 0], np.int32)
    assert walk_trees(acc_V, 2, 1).tolist() == [0, 2, 3, 4]


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
    model, ids = ReferenceModel.load(tmp_path), rng.integers(0, 40, (1, 5))
    before = model.forward(ids).logits_BTV
    kinds = [(block.fff is not None, bool(block.channel)) for block in model.blocks]
    assert kinds == ([(False, True), (True, False)] if "fff_layers" in more else [(True, True)] * 2)
    model.blocks[1].channel.clear()  # what stands beside the trees counts
    changed = "fff_master_width" in more
    assert np.array_equal(model.forward(ids).logits_BTV, before) != changed


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
