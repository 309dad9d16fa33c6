"""The second stay: training in phases, teachers, the small gains at once."""

from __future__ import annotations

from typing import Any

from studies.recipes.cells import RATES, SIZES, THEIRS, Amount, make
from studies.recipes.change import Change

# What the first stay found to help a little, each within the error: half the tokens a step, a rate
# that falls in a line, more weight decay.
GAINS: dict[str, Any] = {
    "batch_size": 16, "micro_batch_size": 16, "schedule": "linear", "weight_decay": 0.1,
}  # fmt: skip
TWIN, SAME, PLAIN = "teacher-transformer-L-1", "teacher-mlgru-L-1", "teacher-dense-mlgru-S-1"


def one(
    amount: Amount, section: str, variant: str, label: str, size: str = "S", **values: Any
) -> dict[str, Any]:
    """A changed MLGRU of this size; 40M tokens and two seeds unless told otherwise."""
    tokens, seeds = values.pop("tokens", amount.recipe), values.pop("seeds", amount.seeds)
    values.setdefault("learning_rate", RATES["box"][size])
    return make(section, variant, label, tokens, seeds, shape=SIZES[size], **values)


def teachers(amount: Amount) -> list[dict[str, Any]]:
    """Models of full precision for the cells after them; longest first."""
    long = {"tokens": amount.pareto, "seeds": (1,), "keep": True}
    return [
        one(amount, "teacher", "transformer-L", "Transformer++ L", "L", base="transformer_box",
            learning_rate=RATES["transformer_box"]["L"], **long),
        one(amount, "teacher", "mlgru-L", "MLGRU L, weights not rounded", "L",
            change=Change(dense=1.0), **long),
        one(amount, "teacher", "dense-mlgru-S", "MLGRU S with dense linear layers",
            model={"linear": "dense"}, learning_rate=2 * THEIRS, seeds=(1,), keep=True),
    ]  # fmt: skip


def phases(amount: Amount) -> list[dict[str, Any]]:
    """Full precision first, then ternary, at equal tokens in all."""
    return [
        one(amount, "phases", "base", "today's recipe"),
        *(
            one(amount, "phases", f"dense-{share}", f"full precision for {share} %",
                change=Change(dense=share / 100))
            for share in (30, 60, 100, 10)
        ),
    ]  # fmt: skip


def distil(amount: Amount) -> list[dict[str, Any]]:
    """Students of the teachers; controls: `phases-base`, and the Pareto models at twice as much."""

    def taught(variant: str, label: str, size: str, name: str, weight: float, **values: Any) -> Any:
        change = Change(teacher=name, weight=weight)
        return one(amount, "distil", variant, label, size, change=change, **values)

    return [
        taught("S-twin-1", "S, the twin L alone is the target", "S", TWIN, 1.0),
        taught("S-twin-0.5", "S, half twin L, half text", "S", TWIN, 0.5),
        taught("S-same-0.5", "S, half MLGRU L, half text", "S", SAME, 0.5),
        taught("M-twin-0.5", "M, half twin L, half text", "M", TWIN, 0.5, seeds=(1,)),
        one(
            amount,
            "distil",
            "S-start",
            "S, starts from the weights of dense MLGRU S",
            change=Change(start=PLAIN),
        ),
        one(amount, "distil", "M-base", "M, today's recipe", "M", seeds=(1,)),
    ]


def optimiser(amount: Amount) -> list[dict[str, Any]]:
    """The small gains at once."""
    label = "half the batch, rate in a line, decay 0.1"
    return [one(amount, "optimiser", "gains", label, **GAINS)]


def longer(amount: Amount) -> list[dict[str, Any]]:
    """Full precision first at twice the tokens and at M; controls: the Pareto models."""
    return [
        one(amount, "longer", f"{size}-dense-{share}", f"{size}, full precision for {share} %",
            size, tokens=amount.pareto, seeds=(1,), change=Change(dense=share / 100))
        for size in ("M", "S")
        for share in (30, 60)
    ]  # fmt: skip


def combined(amount: Amount) -> list[dict[str, Any]]:
    """What may add up."""
    both = Change(dense=0.3, teacher=TWIN, weight=0.5)
    return [
        one(amount, "combined", "dense-30-gains", "30 % full precision, small gains",
            change=Change(dense=0.3), **GAINS),
        one(amount, "combined", "dense-30-twin", "30 % full precision, then half twin L",
            change=both),
        one(amount, "combined", "all", "30 % full precision, then half twin L; small gains",
            change=both, **GAINS),
        one(amount, "combined", "S-twin-long", "S, half twin L, twice the tokens",
            tokens=amount.pareto, seeds=(1,), change=Change(teacher=TWIN, weight=0.5)),
    ]  # fmt: skip


PARTS = {
    "teachers": teachers, "phases": phases, "distil": distil, "optimiser": optimiser,
    "longer": longer, "combined": combined,
}  # fmt: skip
