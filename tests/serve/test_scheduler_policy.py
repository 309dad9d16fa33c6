"""Turns of clients, and how long a step with prompts is."""

from __future__ import annotations

from collections import Counter

import pytest

from nomatmul.serve.policy import (
    FIRST_CHUNK,
    LEAST_CHUNK,
    SCORED_CHUNK,
    SHARE,
    FairQueue,
    Pace,
    Rate,
    Turns,
)


def test_who_was_served_longest_ago_is_first() -> None:
    turns = Turns()
    assert turns.order(["a", "b"]) == ["a", "b"]
    turns.served("a")
    assert turns.order(["a", "b"]) == ["b", "a"]
    turns.served("b")
    # a newcomer is behind whoever waits, and before whoever is served from now on
    assert turns.order(["a", "b", "c"]) == ["a", "b", "c"]
    turns.served("a")
    assert turns.order(["a", "b", "c"]) == ["b", "c", "a"]


def test_a_queue_is_in_turn_for_clients_and_in_order_for_one() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in range(6):
        queue.push("a", item)
    queue.push("b", 10)
    queue.push("b", 11)
    found = []
    while len(queue):
        client, item = queue.first({})
        assert queue.remove(client, item)
        found.append(item)
    assert found == [0, 10, 1, 11, 2, 3, 4, 5]
    assert not queue.remove("a", 5)
    assert "a" not in queue


def test_a_client_with_less_that_runs_comes_first() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.first(Counter(a=1)) == ("b", 2)
    assert queue.first(Counter(a=1)) == ("b", 2)
    assert queue.first(Counter(a=1, b=1)) == ("a", 1)
    assert queue.clear() == [1, 2]
    assert len(queue) == 0


class Machine:
    """A model whose steps take known times."""

    def __init__(self, base: float, stream: float, token: float) -> None:
        self.base, self.stream, self.token = base, stream, token

    def seconds(self, streams: int, tokens: int) -> float:
        return self.base + self.stream * streams + self.token * tokens

    def run(self, pace: Pace, streams: int, steps: int, scored: bool = False) -> list[int]:
        chunks = []
        for _ in range(steps):
            tokens = pace.chunk(streams, scored)
            pace.measured(streams, tokens, scored, self.seconds(streams, tokens))
            chunks.append(tokens)
        return chunks


@pytest.mark.parametrize("streams", [0, 1, 16])
@pytest.mark.parametrize("token", [1e-5, 1e-4, 1e-3])
def test_a_step_stays_below_its_time_and_comes_near(streams: int, token: float) -> None:
    machine, pace = Machine(1e-3, 5e-4, token), Pace(0.1)
    if streams:
        pace.measured(streams, 0, False, machine.seconds(streams, 0))
    chunks = machine.run(pace, streams, 60)
    assert chunks[0] == FIRST_CHUNK
    times = [machine.seconds(streams, chunk) for chunk in chunks]
    assert max(times) <= 0.1
    assert times[-1] >= 0.7 * SHARE * 0.1


def test_a_model_that_grows_slower_gets_shorter_chunks_at_once() -> None:
    pace = Pace(0.1)
    Machine(0.0, 0.0, 1e-4).run(pace, 0, 40)
    slow = Machine(0.0, 0.0, 5e-4)
    chunks = slow.run(pace, 0, 6)
    assert slow.seconds(0, chunks[-1]) <= 0.1
    assert chunks[0] > 2 * chunks[-1]


def test_a_slow_model_reads_a_few_tokens_in_each_step() -> None:
    pace = Pace(0.1)
    assert Machine(0.5, 0.0, 0.05).run(pace, 1, 5)[1:] == [LEAST_CHUNK] * 4


def test_scored_chunks_are_bounded_by_memory_and_measured_alone() -> None:
    pace = Pace(0.1)
    assert max(Machine(0.0, 0.0, 1e-6).run(pace, 0, 20, scored=True)) == SCORED_CHUNK
    assert pace.chunk(0) == FIRST_CHUNK


def test_when_to_come_again_follows_the_measured_rate() -> None:
    rate = Rate()
    assert rate.wait(64) == 1
    for begun in range(20):
        rate.note(begun * 0.5)
    assert rate.wait(64) == pytest.approx(16, abs=1)
    assert rate.wait(2) == 1
    assert rate.wait(10**6) == 60
