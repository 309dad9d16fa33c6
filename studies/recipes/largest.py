"""The size of the model in the box: the best recipe beside today's, on half of the text, on all."""

from __future__ import annotations

from typing import Any

from studies.recipes.cells import Amount, make
from studies.recipes.change import Change
from studies.recipes.second import GAINS
from studies.recipes.texts import ALL, HALF, SMALL, Kind

SHAPE, INNER = (9, 640), 1600  # 11.9 MB packed, the best shape of `box12`


def largest(amount: Amount) -> list[dict[str, Any]]:
    """One seed each, as long as a command of the device machine allows; models are kept."""

    def one(variant: str, label: str, kind: Kind = SMALL, **values: Any) -> dict[str, Any]:
        return make(
            "largest", variant, label, amount.largest, (1,), shape=SHAPE, kind=kind,
            keep=kind == SMALL, model={"intermediate_size": INNER}, **values,
        )  # fmt: skip

    return [
        one("dense-30-gains", "30 % full precision, small gains", change=Change(dense=0.3),
            **GAINS),
        one("base", "today's recipe"),
        one("twin", "Transformer++", base="transformer_box"),
        one("twin-gains", "Transformer++, small gains", base="transformer_box", **GAINS),
        one("twin-gains-half", "Transformer++, small gains, half of the text", HALF,
            base="transformer_box", **GAINS),
        one("dense-30-gains-half", "30 % full precision, small gains, half of the text", HALF,
            change=Change(dense=0.3), **GAINS),
    ]  # fmt: skip


def box(amount: Amount) -> list[dict[str, Any]]:
    """The base of the box on all texts: a teacher, its student, two controls of equal tokens."""

    def one(variant: str, label: str, keep: bool = False, **values: Any) -> dict[str, Any]:
        return make(
            "box", variant, label, amount.box, (1,), shape=SHAPE, kind=ALL, keep=keep,
            model={"intermediate_size": INNER}, **values,
        )  # fmt: skip

    return [
        one("twin", "Transformer++, small gains: the teacher", True, base="transformer_box",
            **GAINS),
        one("today", "today's recipe"),
        one("alone", "30 % full precision, small gains", change=Change(dense=0.3), **GAINS),
        one("taught", "30 % full precision, then half the teacher; small gains", True,
            change=Change(dense=0.3, teacher="box-twin-1", weight=0.5), **GAINS),
    ]  # fmt: skip


PARTS = {"largest": largest, "box": box}
