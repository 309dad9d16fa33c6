"""Many clients at once: what they wait for, of several servers in turn.

A library of serve_load.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from serve_client import Load
from serve_parts import Setting
from serve_sides import DecodeLoop, Served


def measure(setting: Setting, sides: Sequence[Served | DecodeLoop]) -> list[dict[str, Any]]:
    """{"label", "rounds": [...], "memory"} of each side; A B A B, the same prompts in a round."""
    arguments = setting.arguments
    found: list[dict[str, Any]] = [{"label": side.label, "rounds": []} for side in sides]
    for side in sides:  # buffers, threads, first imports
        side.work(_clients(setting, side, seed=1, clients=2, requests=1))
    for number in range(arguments.rounds):
        for side, results in zip(sides, found, strict=True):
            work = side.work(
                _clients(setting, side, 2 + number, arguments.streams, arguments.requests)
            )
            results["rounds"].append(summary(work, arguments.answer))
    for side, results in zip(sides, found, strict=True):
        results["memory"] = side.memory()
    return found


def _clients(
    setting: Setting, side: Served | DecodeLoop, seed: int, clients: int, requests: int
) -> list[list[dict[str, Any]]]:
    """Requests of every client; no two prompts have a beginning in common."""
    bodies = []
    for client in range(clients):
        numbers = range(client * requests, (client + 1) * requests)
        ids = [setting.ids(setting.arguments.prompt, seed * 10_000 + number) for number in numbers]
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        count = setting.arguments.answer
        ours = not side.label.startswith("llama")
        bodies.append([{**setting.body(one, count, ours), **streamed, **side.extra} for one in ids])
    return bodies


def summary(work: Load, count: int) -> dict[str, Any]:
    """Figures of one turn; an answer that is not `count` tokens long is an error."""
    good, errors = [], []
    for answer in work.answers:
        made = answer.usage.get("completion_tokens")
        if answer.error or not answer.times or made != count:
            errors.append(answer.error or f"{made} tokens for {count}")
        else:
            good.append(answer)
    found: dict[str, Any] = {"seconds": work.seconds, "errors": errors, "answers": len(good)}
    found["tokens_per_second"] = count * len(good) / work.seconds
    found["client_cpu"] = work.cpu / work.seconds  # of one core
    if good:
        first, gaps = [one.first for one in good], [gap for one in good for gap in one.gaps]
        found |= {"first_p50": _quantile(first, 50), "first_p95": _quantile(first, 95)}
        found |= {"gap_p95": _quantile(gaps, 95), "gap_max": max(gaps, default=0.0)}
        cached = [_cached(one.usage) for one in good]
        found["cached"] = sum(cached)
    return found


def _cached(usage: dict[str, Any]) -> int:
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0
