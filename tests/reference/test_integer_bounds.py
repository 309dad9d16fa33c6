"""No input can exceed the bounds of integer inference, and inputs exist that come near them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomatmul.formats.config import ModelConfig
from nomatmul.reference.integer import bounds
from nomatmul.reference.integer.folds import (
    Branch,
    Fold,
    Forest,
    Fractions,
    Gated,
    Layer,
    Linear,
    Mixer,
    Network,
    Weight,
)
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.numerics import Formats
from nomatmul.reference.integer.run import Run
from nomatmul.reference.integer.trace import Trace

F = Formats()
TOP = (1 << 23) - 1
CONFIG = ModelConfig(16, 24, 2)  # of which integer inference reads nothing


def weight(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """Of a norm: near 1, of many sizes, or with holes and another sign."""
    values = {
        "plain": 1 + 0.2 * rng.standard_normal(size),
        "wide": np.exp(1.2 * rng.standard_normal(size)),
        "holes": rng.standard_normal(size) * (rng.random(size) < 0.7),
    }[kind]
    return np.asarray(values)


def fold(
    rng: np.random.Generator,
    name: str,
    inputs: int,
    sizes: dict[str, int],
    kind: str,
    **more: float,
) -> Fold:
    """A fold with a branch for each of `sizes` {linear: outputs}, but gate_proj and up_proj one."""
    ones = kind == "ones"
    outer = np.ones(inputs) if ones else weight(rng, inputs, kind)
    root = Weight.of_ones(inputs) if ones else Weight.of(outer, 16)
    shared = [key for key in sizes if key.endswith("up_proj")]
    branches = []
    for key in [key for key in sizes if key not in shared]:
        inner = weight(rng, inputs, "plain" if ones else kind)
        made = Weight.of(outer * inner * (root.values != 0), 16)
        linears = [key, *shared] if key.endswith("gate_proj") else [key]
        values = [rng.integers(-1, 2, (sizes[n], inputs)).astype(np.int8) for n in linears]
        scales = rng.uniform(0.01, 0.5, len(linears))
        branches.append(Branch(key, made, tuple(map(Linear, linears, values, scales))))
    return Fold(name, root, inputs, tuple(branches), **more)


def network(seed: int, kind: str, *, trees: bool = False, size: int = 24) -> Network:
    """Two layers with the norms of one kind."""
    rng, layers = np.random.default_rng(seed), []
    for number in range(2):
        at, c = f"layers.{number}.mixer", f"layers.{number}.channel"
        enter = fold(rng, at, size, {f"{at}.{k}_proj": size for k in "fig"}, kind)
        eps = {"eps": 1e-11, "gate_eps": 1e-6}
        leave = fold(rng, f"{at}.o_proj", size, {f"{at}.o_proj": size}, kind, **eps)
        mixer = Mixer(at, enter, leave, rng.integers(0, 65536, size))
        layers.append(
            Layer(mixer, forest(rng, c, size, kind) if trees else gated(rng, c, size, kind))
        )
    scale = rng.uniform(0.001, 0.1, 16).astype(np.float32)
    head = fold(rng, "head", size, {"head": 16}, kind)
    return Network(rng.integers(-127, 128, (16, size)).astype(np.int8), scale, tuple(layers), head)


def gated(rng: np.random.Generator, at: str, size: int, kind: str) -> Gated:
    enter = fold(rng, at, size, {f"{at}.gate_proj": 40, f"{at}.up_proj": 40}, kind)
    down = f"{at}.down_proj"
    return Gated(at, enter, fold(rng, down, 40, {down: size}, "ones", eps=1e-6))


def forest(rng: np.random.Generator, at: str, size: int, kind: str) -> Forest:
    trees, depth = 2, 2
    enter = fold(rng, at, size, {f"{at}.w_in": trees * 7}, kind)
    rows = Linear(f"{at}.w_out", rng.integers(-1, 2, (trees * 7, size)).astype(np.int8), 0.3)
    branch = Branch(f"{at}.w_out", Weight.of(weight(rng, trees * 7, kind), 16), (rows,))
    leave = Fold(f"{at}.w_out", Weight.of_ones(1), trees * (depth + 1), (branch,), 1e-6)
    return Forest(at, enter, leave, trees, depth)


def inside(trace: Trace, model: IntegerModel) -> None:
    """Whether all that a token left lies within the bounds, and so within the widths."""
    largest, unit = model.bounds.largest, 2.0**-12
    fractions = model.fractions
    for name, values in trace:
        peak = np.abs(values).max() * 1.0
        layer = int(name.split(".")[1]) if name.startswith("layers") else 0
        if name.endswith(".sums"):
            assert peak < 1 << 23, name
        elif name.endswith(".h") and "mixer" in name:
            assert peak * unit <= largest[name] + unit, name
        elif name.endswith(".g"):
            assert peak * unit <= largest[name.removesuffix("g") + "g_proj"] + unit, name
        elif name.endswith(".u"):
            part = fractions.mixer if "mixer" in name else fractions.channel
            assert peak * 2.0 ** -part[layer] <= largest[name] + 2.0 ** -part[layer], name
            assert peak < TOP, name
        elif name.endswith("residual"):
            slack = 6 * 2.0**-fractions.residual
            assert peak * 2.0**-fractions.residual <= model.bounds.residual.max() + slack, name
            assert peak < TOP, name
        elif name == "logits":
            assert peak * model.logits_scale <= largest["head"] + model.logits_scale, name


@pytest.mark.parametrize("trees", [False, True], ids=["glu", "trees"])
@pytest.mark.parametrize("kind", ["plain", "wide", "holes"])
def test_nothing_exceeds_its_bound_whatever_the_state(kind, trees):
    for seed in range(4):
        net = network(seed, kind, trees=trees)
        model, rng = IntegerModel(CONFIG, net, F), np.random.default_rng(seed)
        state = model.new_state()
        for token in range(16):
            trace = Trace()
            model.step(token, state, trace)
            inside(trace, model)
            if token % 3 == 0:  # states that no token leaves, up to the bound
                limits = [model.bounds.largest[f"layers.{n}.mixer.h"] * 4096 for n in range(2)]
                state = [(rng.choice([-1, 1], (1, 24)) * top).astype(np.int64) for top in limits]


def worst(fold: Fold, branch: Branch, linear: Linear, row: int, shape: np.ndarray) -> np.ndarray:
    """An x whose sum over a row is as large as a norm lets it be: x * w1 in the direction of the
    weights; `shape` [K] bends it."""
    root, weight = fold.root.real(), branch.weight.real()
    ratio = np.divide(weight, root, out=np.zeros_like(root), where=root != 0)
    p = linear.values[row] * ratio * shape
    x = np.divide(p, root, out=np.zeros_like(root), where=root != 0)
    return np.rint(x / max(np.abs(x).max(), 1e-9) * TOP).astype(np.int64)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["plain", "wide", "holes"]),
    row=st.integers(0, 23),
    bend=st.floats(0, 2),
    lower=st.integers(0, 23),
)
def test_the_worst_vector_stays_within_the_bound_of_a_linear(seed, kind, row, bend, lower):
    rng = np.random.default_rng(seed)
    made = fold(rng, "fold", 24, {"linear": 24}, kind)
    ((branch, linear),) = made.linears()
    limit = bounds.output_bounds(made, branch, linear)
    fraction = 22 - int(np.ceil(np.log2(max(limit.max(), 1e-3))))
    run = Run({"fold": made.constants(12)}, Fractions(12), F)
    x = worst(made, branch, linear, row, 1 + bend * rng.standard_normal(24)) >> lower
    (out,) = run.outputs(made, x, fraction)
    assert np.all(np.abs(out) <= limit * 2.0**fraction + 1)


def test_bounds_are_near_the_worst_case():
    """Of a linear with 600 inputs: but for roundings, the vector above reaches the bound."""
    rng = np.random.default_rng(2)
    made = fold(rng, "fold", 600, {"linear": 3}, "plain")
    ((branch, linear),) = made.linears()
    run = Run({"fold": made.constants(12)}, Fractions(12), F)
    (out,) = run.outputs(made, worst(made, branch, linear, 1, np.ones(600)), 12)
    limit = bounds.output_bounds(made, branch, linear)
    assert 0.88 * limit[1] < out[1] / 4096 <= limit[1]


def test_fractions_are_the_largest_that_fit():
    net = network(1, "plain")
    fractions, found = bounds.prove(net, F)
    for bits in (20, 24, 28):
        wider, _ = bounds.prove(net, F.replace(vector_bits=bits))
        assert wider.residual == min(fractions.residual + bits - 24, 20)
    peak = float(found.residual.max())
    assert peak < 2.0 ** (23 - fractions.residual) <= 2 * (peak + 1)


def scaled(net: Network, name: str, factor: float) -> Network:
    """A network in which one linear has a larger scale."""

    def larger(fold: Fold) -> Fold:
        branches = tuple(
            Branch(b.name, b.weight, tuple(change(linear) for linear in b.linears))
            for b in fold.branches
        )
        return Fold(fold.name, fold.root, fold.inputs, branches, fold.eps, fold.gate_eps)

    def change(linear: Linear) -> Linear:
        scale = linear.scale * (factor if linear.name == name else 1)
        return Linear(linear.name, linear.values, scale)

    layers = tuple(
        Layer(
            Mixer(m.name, larger(m.enter), larger(m.leave), m.lower_bound),
            Gated(c.name, larger(c.enter), larger(c.leave)),
        )
        for m, c in ((layer.mixer, layer.channel) for layer in net.layers)
    )
    return Network(net.embedding, net.embedding_scale, layers, larger(net.head))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.1.mixer.f_proj", r"the outputs of layers\.1\.mixer\.f_proj may reach"),
        ("layers.0.channel.up_proj", r"the outputs of layers\.0\.channel\.up_proj may reach"),
        ("layers.0.mixer.o_proj", "the residual may reach"),
        ("head", "logits may reach"),
    ],
)
def test_widths_that_overflow_are_refused_with_those_that_would_do(name, what):
    net = scaled(network(1, "plain"), name, 3e5)
    with pytest.raises(ValueError, match=rf"{what} .*; vector_bits=\d+ would do") as refused:
        IntegerModel(CONFIG, net, F)
    text = str(refused.value)
    assert "vector_bits 24 with" in text
    needed = int(text.rpartition("vector_bits=")[2].split()[0])
    if needed <= 32:
        assert bounds.prove(net, F.replace(vector_bits=needed))
    with pytest.raises(ValueError, match=what):
        bounds.prove(net, F.replace(vector_bits=min(needed - 1, 32)))


def test_a_state_or_a_sum_that_overflows_is_refused():
    net = network(1, "plain")
    with pytest.raises(
        ValueError, match=r"the state of layers\.0\.mixer may reach .* state_bits 14"
    ):
        bounds.prove(net, F.replace(state_bits=14))
    with pytest.raises(
        ValueError, match=r"the sums of layers\.0\.mixer\..* reach .* sum_bits=14 would do"
    ):
        bounds.prove(network(1, "plain", size=48), F.replace(sum_bits=12))


def test_a_vector_of_more_inputs_than_a_sum_of_squares_takes_is_refused():
    rng = np.random.default_rng(0)
    net = network(1, "plain")
    wide = fold(rng, "head", 70000, {"head": 1}, "plain")
    with pytest.raises(ValueError, match="head has 70000 inputs, more than 65536"):
        bounds.prove(Network(net.embedding, net.embedding_scale, (), wide), F)


def test_fractions_may_be_smaller_and_not_larger():
    net = network(1, "plain")
    fractions, _ = bounds.prove(net, F)
    smaller = dataclasses.replace(fractions, residual=fractions.residual - 3)
    assert IntegerModel(CONFIG, net, F, smaller).fractions == smaller
    for change in ({"residual": fractions.residual + 1}, {"mixer": (30, 4)}, {"channel": (4,)}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"the fraction {name} is .*, the bounds leave \["):
            IntegerModel(CONFIG, net, F, dataclasses.replace(fractions, **change))
