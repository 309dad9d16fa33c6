"""Rows of a comparison that are made up."""

from __future__ import annotations


def make_row(variant: str, seed: int, score: float, **values) -> dict:
    active = values.pop("active", 0)
    return {
        "section": "s", "variant": variant, "label": variant, "stage": "final", "status": "ok",
        "seed": seed, "steps": 100, "steps_planned": 100, "tokens": 1000, "parameters": 10,
        "neurons": values.pop("neurons", active), "active": active, "flops_per_token": 10.0,
        "flops_masked_per_token": 20.0, "seconds": 10.0, "tokens_per_second": 100,
        "learning_rate": 1e-3, "bpb": score, "loss": score * 2,
        "held_out_curve": [[50, score * 2 + 1, 5.0], [100, score * 2, 10.0]], **values,
    }  # fmt: skip


ROWS = [
    make_row("dense", 1, 1.50, active=2048),
    make_row("dense", 2, 1.52, active=2048),
    make_row("dense-112", 1, 1.70, active=112),
    make_row("dense-112", 2, 1.71, active=112),
    make_row("none", 1, 1.80),
    make_row("none", 2, 1.80),
    make_row("fff-16x6", 1, 1.60, active=112, neurons=2032),
    make_row("fff-16x6", 2, 1.64, active=112, neurons=2032),
]
