"""A memory on chip answers bursts like any other, a word a cycle."""

from __future__ import annotations

import random

import pytest
from hardware.streams import Bench

from nomatmul.hardware.rtl.on_chip import OnChipMemory


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_bursts_come_back_in_order_with_errors_behind_the_image(stall: float) -> None:
    rng = random.Random(3)
    words = [rng.getrandbits(64) for _ in range(50)]
    memory = OnChipMemory(64, words)
    requests = [(rng.randrange(70), rng.randint(1, 20)) for _ in range(15)] + [((1 << 32) - 1, 1)]
    bench = Bench(memory, seed=4)
    bench.drive(
        memory.port.request, [{"address": a, "length": n} for a, n in requests], stall=stall
    )
    got = bench.collect(memory.port.response, sum(n for _, n in requests), stall=stall)
    bench.run()
    assert got == [
        {
            "data": words[a + k] if a + k < 50 else 0,
            "error": int(a + k >= 50),
            "last": int(k == n - 1),
        }
        for a, n in requests
        for k in range(n)
    ]


def test_a_long_burst_is_a_word_a_cycle() -> None:
    memory = OnChipMemory(16, list(range(400)))
    bench = Bench(memory)
    bench.drive(memory.port.request, [{"address": 0, "length": 400}])
    bench.collect(memory.port.response, 400)
    assert bench.run() <= 400 + 12


@pytest.mark.parametrize(("words", "says"), [([], "at least one"), ([1, 1 << 16], "word 1")])
def test_impossible_images_are_refused(words: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OnChipMemory(16, words)
