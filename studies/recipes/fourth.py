"""The recurrence, all ternary: each mixer at three rates, MLGRU beside them; then second seeds."""

from __future__ import annotations

from typing import Any

from studies.recipes.cells import RATES, Amount
from studies.recipes.change import Change
from studies.recipes.recurrences import MIXERS
from studies.recipes.second import one
from studies.recipes.texts import ALL

RATE = RATES["box"]["S"]
TOKENS = 20e6


def recurrence(
    amount: Amount, section: str = "recurrence", seeds: tuple[int, ...] = (1,)
) -> list[dict[str, Any]]:
    """One seed at half of MLGRU's rate, at the whole and a quarter; MLGRU at twice, too.

    MLGRU comes first at each rate, so that a command that is cut has its control. The texts are all
    of them (studies/box/base.py), so that no token is seen twice.
    """
    cells = []
    for rate in (0.5, 1.0, 0.25, 2.0):
        names = ["mlgru", *(name for name in MIXERS if name != "attention")]
        for name in names if rate <= 1 else ["mlgru"]:
            change = Change() if name == "mlgru" else Change(mixer=name)
            cells.append(
                one(amount, section, f"{name}-{rate}", f"{name}, {rate} of MLGRU's rate", kind=ALL,
                    tokens=TOKENS, learning_rate=rate * RATE, seeds=seeds, change=change)
            )  # fmt: skip
    return cells


def recurrence_again(amount: Amount) -> list[dict[str, Any]]:
    """The second seeds of all of them; `--cells` names those at each mixer's best rate."""
    return recurrence(amount, "recurrence-again", (2,))


PARTS = {"recurrence": recurrence, "recurrence-again": recurrence_again}
