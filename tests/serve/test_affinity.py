"""Which replica gets a request: beginnings, the table, what is balanced."""

from __future__ import annotations

import json

import pytest

from nomatmul.serve.affinity import PrefixTable, chain, state_of

SYSTEM = {"role": "system", "content": "Be brief."}


def chat(*contents: str, system: bool = True) -> bytes:
    """A conversation: what the user said, with an answer after each but the last."""
    messages = [SYSTEM] if system else []
    for number, content in enumerate(contents):
        if number:
            messages.append({"role": "assistant", "content": f"answer {number}"})
        messages.append({"role": "user", "content": content})
    return json.dumps({"model": "m", "messages": messages}).encode()


def text(prompt: object) -> bytes:
    return json.dumps({"model": "m", "prompt": prompt}).encode()


def names(body: bytes) -> list[bytes]:
    return [link.name for link in chain(body)]


def test_a_further_turn_begins_with_the_chain_of_the_one_before():
    assert names(chat("a", "b"))[:2] == names(chat("a"))
    assert names(chat("a", "b"))[2:] != names(chat("a", "c"))[2:]
    assert names(chat("a")) != names(chat("a", system=False))


@pytest.mark.parametrize("unit", ["x", [7]])
def test_a_longer_prompt_begins_with_all_whole_pieces_of_a_shorter_one(unit):
    short, long = names(text(unit * 1000)), names(text(unit * 1500))
    assert short[:-1] == long[: len(short) - 1]
    assert len(short) > 5
    assert len(names(text(unit * (1 << 20)))) < 200  # however long


def test_another_model_or_another_order_is_another_beginning():
    body = json.loads(chat("a"))
    other = json.dumps({**body, "model": "n"}).encode()
    assert not set(names(other)) & set(names(chat("a")))
    again = json.dumps(dict(reversed(body.items()))).encode()
    assert names(again) == names(chat("a"))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"prompt": 5}', b'{"messages": [1]}', b"\xff"]
)
def test_a_body_that_is_no_request_has_no_beginning(body):
    assert chain(body) == []
    assert state_of("/v1/completions", body) is None


def test_conversations_stay_and_new_ones_are_spread():
    table, load, alive = PrefixTable(), {0: 0, 1: 0}, {0, 1}
    first = table.choose(chain(chat("a")), alive, load, slack=4)
    table.record(chain(chat("a")), first)
    load[first] += 1
    second = table.choose(chain(chat("z")), alive, load, slack=4)
    assert second != first  # only the system message is the same
    table.record(chain(chat("z")), second)
    load[second] += 1
    for _ in range(3):  # busy, but not much more than the other
        assert table.choose(chain(chat("a", "b")), alive, load, slack=4) == first
        load[first] += 1
    load[first] += 1
    assert table.choose(chain(chat("a", "b")), alive, load, slack=4) == second


def test_a_lost_replica_gets_nothing_and_its_conversations_move():
    table, load = PrefixTable(), {0: 0, 1: 5}
    table.record(chain(chat("a")), 0)
    assert table.choose(chain(chat("a", "b")), {1}, load, slack=4) == 1
    table.record(chain(chat("a", "b")), 1)
    assert table.choose(chain(chat("a", "b", "c")), {0, 1}, {0: 0, 1: 3}, slack=4) == 1
    with pytest.raises(ValueError, match="no replica is alive"):
        table.choose([], set(), load, slack=4)


def test_the_table_forgets_what_was_used_longest_ago():
    table, load = PrefixTable(size=3), {0: 0, 1: 0}
    table.record(chain(chat("a")), 1)
    table.record(chain(chat("b")), 0)
    table.record(chain(chat("c")), 0)
    assert table.choose(chain(chat("a", "b")), {0, 1}, load, slack=4) == 0
    assert len(table._replica) == 3


def test_named_states_have_one_replica_whoever_asks():
    assert state_of("/v1/states/book", b"") == "book"
    assert state_of("/v1/completions", b'{"state": "book", "prompt": "x"}') == "book"
    assert state_of("/v1/completions", b'{"prompt": "the \\"state\\""}') is None
    homes = {PrefixTable.of_state(f"book{n}", 3, {0, 1, 2}) for n in range(30)}
    assert homes == {0, 1, 2}
    home = PrefixTable.of_state("book", 3, {0, 1, 2})
    assert PrefixTable.of_state("book", 3, {0, 1, 2} - {home}) != home
