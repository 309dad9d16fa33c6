"""The unit of trees against the oracle: equal sums, rows, norm weights and outputs, whatever the
order in which memory, product unit and row unit are ready.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hardware.tree_bench import SMALL, Forest, TreeBench

from nomatmul.hardware.design import TREE_ROW_BITS
from nomatmul.hardware.rtl.ports import Epilogue

# (trees, depth, size): awkward sizes, one tree, no decision at all, one column.
SHAPES = [(3, 3, 37), (1, 5, 33), (5, 0, 64), (4, 2, 1), (1, 0, 7), (8, 3, 41)]


def inputs(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, size).astype(np.int8)


def check(forest: Forest, bench: TreeBench, seed: int = 0, *, turns: int = 1) -> int:
    """Walk and combine `turns` times; everything that the unit says is the oracle's."""
    steps, expected = [], []
    q_D = inputs(forest.size, seed)
    bench.q_D = q_D
    sums_A, norm_A, rows_A = forest.expected(q_D)
    for turn in range(turns):
        h_A = inputs(forest.visits, seed + turn + 1)
        steps += [
            ("walk", bench.walk_command()),
            ("activations", h_A),
            ("combine", bench.combine_command()),
        ]
        expected.append(forest.combined(h_A, rows_A))
    cycles = bench.run(*steps)
    for turn, y_D in enumerate(expected):
        count = forest.visits + forest.size
        results = bench.results[turn * count : (turn + 1) * count]
        walked, combined = results[: forest.visits], results[forest.visits :]
        assert {r["row"]: r["sum"] for r in walked} == dict(enumerate(sums_A.tolist()))
        assert [r["last"] for r in walked] == [0] * (forest.visits - 1) + [1]
        assert [r["sum"] for r in combined] == y_D.tolist()
        assert [r["row"] for r in combined] == list(range(forest.size))
        assert [r["last"] for r in combined] == [0] * (forest.size - 1) + [1]
    assert bench.parameters == {24 + a: int(w) for a, w in enumerate(norm_A)}
    # visited records only, each once a turn
    visited_in = [bench.BASE_IN + int(r) * bench.stride_in for r in rows_A]
    visited_out = [bench.BASE_OUT + int(r) * bench.stride_out for r in rows_A]
    assert sorted(bench.fetched) == sorted((visited_in + visited_out) * turns)
    assert bench.pulses == {"memory_error": 0, "illegal": 0, "refused": 0}
    assert len(bench.results) == turns * (forest.visits + forest.size)
    return cycles


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_walk_and_combine_are_the_oracles(shape, stall):
    forest = Forest(SMALL, *shape, seed=sum(shape))
    check(forest, TreeBench(forest, stall=stall, seed=len(str(shape))))


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_zero_go_left(seed):
    forest = Forest(SMALL, 6, 3, 35, seed=seed, ties=True)
    sums_A, _, _ = forest.expected(inputs(35, seed))
    assert (sums_A == 0).sum() > 3
    check(forest, TreeBench(forest, stall=0.2, seed=seed), seed)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_bits": 16},
        {"memory_bits": 256, "packing": "1.6bit"},
        {"packing": "1.6bit", "combine_lanes": 32},
        {"element_lanes": 8, "combine_lanes": 4, "tree_rows": 16},
        {"lanes": 64, "memory_bits": 128, "combine_lanes": 64},
    ],
    ids=str,
)
def test_other_designs(changes):
    design = dataclasses.replace(SMALL, **changes)
    forest = Forest(design, 4, 3, 70, seed=5)
    check(forest, TreeBench(forest, stall=0.3, seed=3))


def test_a_second_token_finds_nothing_of_the_first():
    forest = Forest(SMALL, 3, 2, 21, seed=8)
    check(forest, TreeBench(forest, stall=0.3, seed=8), turns=3)


def test_the_commands_that_it_makes():
    forest = Forest(SMALL, 3, 2, 40, seed=1)
    bench = TreeBench(forest)
    check(forest, bench)
    scalar = {"m": 1 << 23, "e": -9}
    assert bench.products == [{"rows": 9, "beats": 2, "slots": 1, "act": 2}]
    walk, combine = bench.rows
    assert (walk["epilogue"], walk["dst"]) == (Epilogue.SILU, 20)
    assert (walk["rows"], walk["slots"]) == (9, 1)
    assert (walk["scalars"][0], walk["fraction"]) == (scalar, 12)
    assert (combine["epilogue"], combine["rows"], combine["slots"]) == (Epilogue.ADD, 40, 1)
    assert (combine["dst"], combine["aux"], combine["fraction"]) == (40, 40, 9)
    assert combine["scalars"][0] == {"m": 1 << 23, "e": -5}


def test_latency_is_hidden_behind_the_other_trees():
    """Eight trees: a memory that answers 20 cycles later costs less than a tenth of its latency."""
    forest = Forest(SMALL, 8, 3, 60, seed=2)
    quick, slow = (check(forest, TreeBench(forest, latency=cycles)) for cycles in (1, 21))
    assert slow - quick < 0.1 * 20 * 2 * forest.visits


def test_memory_errors_are_flagged_and_end():
    forest = Forest(SMALL, 2, 2, 40, seed=3)
    broken = (TreeBench.BASE_IN + 1, TreeBench.BASE_OUT)  # of the first roots
    bench = TreeBench(forest, broken=broken, stall=0.2)
    bench.q_D = inputs(40, 3)
    bench.run(("walk", bench.walk_command()), ("combine", bench.combine_command()))
    assert bench.pulses["memory_error"] == 2
    assert len(bench.results) == forest.visits + forest.size


def test_addresses_outside_memory_are_flagged_and_end():
    forest = Forest(SMALL, 2, 1, 40, seed=3)
    bench = TreeBench(forest)
    bench.q_D = inputs(40, 3)
    bench.run(
        ("walk", bench.walk_command(base=0xFFFF_FFF0)),
        ("combine", bench.combine_command(base=0xFFFF_FFF0)),
    )
    words = forest.visits * (bench.stride_in + bench.stride_out)
    assert bench.pulses["memory_error"] == words
    assert len(bench.results) == forest.visits + forest.size


def test_a_code_that_is_none_is_flagged_and_counts_as_nothing():
    forest = Forest(SMALL, 1, 0, 12, seed=4)
    bench = TreeBench(forest, extra={TreeBench.BASE_OUT: 0b11})  # code 3, and 31 times -1
    q_D = bench.q_D = inputs(12, 4)
    steps = [("walk", bench.walk_command()), ("activations", np.array([7], np.int8))]
    bench.run(*steps, ("combine", bench.combine_command()))
    assert bench.pulses == {"memory_error": 0, "illegal": 1, "refused": 0}
    assert [r["sum"] for r in bench.results[1:]] == [0] + [-7] * 11
    assert len(q_D) == 12


REFUSED = {
    "visits": ("walk", {"trees": 33, "depth": 0}),
    "visits of levels": ("walk", {"trees": 3, "depth": 10}),
    "rows": ("walk", {"trees": 1, "depth": TREE_ROW_BITS}),
    "deepest": ("walk", {"trees": (1 << 20) - 1, "depth": 31}),
    "no trees": ("walk", {"trees": 0}),
    "no beats": ("walk", {"beats": 0}),
    "too few words": ("walk", {"stride": 2}),
    "too many words": ("walk", {"stride": 5}),
    "no visits": ("combine", {"count": 0}),
    "count": ("combine", {"count": 33}),
    "no rows": ("combine", {"rows": 0}),
    "columns": ("combine", {"rows": 129, "stride": 5}),
    "most columns": ("combine", {"rows": (1 << 20) - 1}),
    "words": ("combine", {"stride": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_commands_without_room_are_refused_and_leave_it_able(name):
    forest = Forest(SMALL, 2, 1, 40, seed=6)
    bench = TreeBench(forest)
    bench.q_D = inputs(40, 6)
    kind, changes = REFUSED[name]
    command = bench.walk_command if kind == "walk" else bench.combine_command
    bench.run((kind, command(**changes)), ("walk", bench.walk_command()))
    assert bench.pulses["refused"] == 1
    assert len(bench.results) == forest.visits
    assert len(bench.rows) == len(bench.products) == 1
