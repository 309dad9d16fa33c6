"""The third stay: scales of groups, attention in some layers, gains at M."""

from __future__ import annotations

from typing import Any

from studies.recipes.cells import RATES, Amount
from studies.recipes.change import Change
from studies.recipes.second import GAINS, one

RATE = RATES["box"]["S"]


def groups(amount: Amount) -> list[dict[str, Any]]:
    """A scale for each 64, 128 or 256 inputs of a row in place of one a matrix."""
    return [
        one(amount, "groups", f"group-{group}", f"a scale for {group} inputs of a row",
            change=Change(group=group))
        for group in (128, 256, 64)
    ] + [
        one(amount, "groups", "group-128-gains", "128 inputs, 30 % full precision, small gains",
            change=Change(group=128, dense=0.3), **GAINS),
    ]  # fmt: skip


def hybrids(amount: Amount) -> list[dict[str, Any]]:
    """Ternary attention in some of the five layers; controls: `phases-base`, ternary attention."""
    return [
        one(amount, "hybrids", f"attention-{every}", f"ternary attention in {which}",
            seeds=(1,), change=Change(mixer="attention", every=every))
        for every, which in ((4, "layer 4 of 5"), (2, "layers 2 and 4 of 5"))
    ]  # fmt: skip


def gains(amount: Amount) -> list[dict[str, Any]]:
    """Do the small gains last? M for 80M tokens; control: the Pareto model, and its second seed."""
    long = {"tokens": amount.pareto}
    return [
        one(amount, "gains", "M-base", "M, today's recipe", "M", **long),
        one(amount, "gains", "M-gains", "M, small gains", "M", **long, **GAINS),
        one(amount, "gains", "M-dense-30-gains", "M, 30 % full precision, small gains", "M",
            **long, **GAINS, change=Change(dense=0.3)),
        *(
            one(amount, "gains", f"{size}-twin-gains", f"Transformer++ {size}, small gains", size,
                base="transformer_box", learning_rate=RATES["transformer_box"][size],
                **({} if size == "S" else long | {"seeds": (1,)}), **GAINS)
            for size in ("M", "S")
        ),
    ]  # fmt: skip


PARTS = {"groups": groups, "hybrids": hybrids, "gains": gains}
