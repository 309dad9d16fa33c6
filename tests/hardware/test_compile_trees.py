"""Records of w_out, and the limits of what the unit of trees has room for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hardware.models import write_random_model
from hardware.tree_bench import SMALL, Forest, words_of

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.compile.trees import check_trees, out_records, out_words
from nomatmul.hardware.design import Design
from nomatmul.reference.integer.folds import Forest as Folds
from nomatmul.reference.integer.numerics import Formats
from nomatmul.reference.integer.reading import network_of


@pytest.mark.parametrize("size", [1, 8, 33, 64])
@pytest.mark.parametrize("changes", [{}, {"packing": "1.6bit"}, {"memory_bits": 16}], ids=str)
def test_records_are_what_the_unit_takes(size, changes):
    """As tests of the unit write them, word for word."""
    forest = Forest(dataclasses.replace(SMALL, **changes), 2, 2, size, seed=size)
    bits = forest.design.memory_bits
    records = out_records(forest.w_out_VD, forest.design)
    assert [words_of(r, bits) for r in records] == forest.records()[1]
    assert out_words(size, forest.design) == len(forest.records()[1][0])


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> Folds:
    directory = write_random_model("trees-3x3", tmp_path_factory.mktemp("limits"))
    channel = network_of(PackedReader(directory), Formats()).layers[1].channel
    assert isinstance(channel, Folds)
    return channel


def test_trees_that_fit(forest):
    check_trees(forest, Design(trees=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trees": False}, "layers.1.channel has trees, and the design has no unit"),
        (
            {"tree_rows": 8},
            "its trees have 12 visits a token, and tree_rows is 8",
        ),
        ({"vector_words": 64}, "have 40 outputs, and half of vector_words is 32"),
    ],
)
def test_trees_that_do_not_fit_are_named(forest, changes, words):
    design = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        check_trees(forest, design)
    assert "\n" not in str(caught.value)


def test_more_rows_than_addresses_reach(forest):
    ((branch, w_out),) = forest.leave.linears()
    many = np.broadcast_to(w_out.values[:1], (1 << 18, w_out.values.shape[1]))
    linear = dataclasses.replace(w_out, values=many)
    leave = dataclasses.replace(
        forest.leave, branches=(dataclasses.replace(branch, linears=(linear,)),)
    )
    with pytest.raises(ValueError, match="have 262144 rows, and a layer may have 262143"):
        check_trees(dataclasses.replace(forest, leave=leave), Design(trees=True))
