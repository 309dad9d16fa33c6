"""Planted faults: one small change in one place of the hardware each, and the check that finds it.

`planted(fault)` puts the changed function in the place of the sound one, in this process, until it
ends. A fault's text must be in its file exactly once, so a fault never quietly plants nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in rtl/`module`.py. check: "test_file:test" of tests/hardware, which must
    fail with it; arguments of the test."""

    name: str
    module: str
    old: str
    new: str
    check: str
    arguments: tuple[Any, ...] = ()

    def run(self) -> None:
        """Run the check; it raises AssertionError where it finds something."""
        file, test = self.check.split(":")
        function: Callable[..., None] = getattr(importlib.import_module(f"hardware.{file}"), test)
        function(*self.arguments)


FAULTS = [
    Fault(
        "a dropped carry of the adder tree", "array",
        "Cat(carry, right)", "Cat(Const(0, 1), right)",
        "test_products:test_array_adds_products", (32,),
    ),
    Fault(
        "a shift of one bit too many", "rescale",
        "(MANTISSA_BITS - FACTOR_BITS) - up", "(MANTISSA_BITS - FACTOR_BITS - 1) - up",
        "test_row_unit:test_state_goes_from_token_to_token", 
    ),
    Fault(
        "a beat swallowed under a stall", "gearbox",
        "m.d.comb += ways.eq(~have | onward)", "m.d.comb += ways.eq(1)",
        "test_memory_path:test_gearbox_cuts_regions", (64, 56, 0.0, 0.5),
    ),
    Fault(
        "a FIFO that takes one word too many", "fifo",
        "self.input.ready.eq(~stored[-1])", "self.input.ready.eq(stored != self.depth + 1)",
        "test_memory_path:test_fifo_keeps_order", (4, 0.0, 0.5),
    ),
    Fault(
        "more bursts than the FIFO has room for", "streamer",
        "room.eq(self.credits[low:].any())", "room.eq(1)",
        "test_memory_path:test_streamer_reads_what_commands_say", (4, 8, 0.0, 0.5),
    ),
    Fault(
        "no clamp of the state", "recurrence",
        "Mux(outside, limit, value[:bits].as_signed()), outside",
        "value[:bits].as_signed(), outside",
        "test_row_unit:test_saturations_are_counted_by_cause",
    ),
    Fault(
        "a wrong interpolation between entries of the table", "functions",
        "step * rest", "step * (rest >> 1)",
        "test_functions:test_sigmoid_and_silu_equal_the_reference", ({},),
    ),
    Fault(
        "a stale state behind a fresh token", "gates",
        "Mux(self.fresh, 0, h)", "h",
        "test_faults:check_mlgru",
    ),
    Fault(
        "trees that go left where the sum is positive", "walk",
        "sums.payload.sum > 0", "sums.payload.sum < 0",
        "test_tree_unit:test_walk_and_combine_are_the_oracles", ((3, 3, 37), 0.0),
    ),
    Fault(
        "trees that go right where the sum is 0", "walk",
        "sums.payload.sum > 0", "sums.payload.sum >= 0",
        "test_tree_unit:test_sums_of_zero_go_left", (0,),
    ),
    Fault(
        "a node asked for before its parent's sum is in", "walk",
        "(slack != 0) & ~order.done", "~order.done",
        "test_tree_unit:test_walk_and_combine_are_the_oracles", ((1, 5, 33), 0.0),
    ),
    Fault(
        "sums of trees read before the last is written", "combine",
        "with m.If(drained):", "with m.If(1):",
        "test_tree_unit:test_walk_and_combine_are_the_oracles", ((1, 0, 7), 0.0),
    ),
    Fault(
        "sums of trees that begin with those of the token before", "combine",
        "Mux(first_2, 0, kept[k])", "kept[k]",
        "test_tree_unit:test_a_second_token_finds_nothing_of_the_first",
    ),
    Fault(
        "answers of memory whose bursts are mixed", "arbiter",
        "answer.valid & answer.ready & answer.payload.last", "answer.valid & answer.ready",
        "test_memory_path:test_two_readers_share_a_memory", (0.0, 0.0),
    ),
    Fault(
        "a root of an odd exponent", "scalar_unit",
        "Mux(odd, held.a.m << 1, held.a.m)", "held.a.m",
        "test_scalar_unit:test_random_commands_one_after_another", (0.0,),
    ),
    Fault(
        "a largest element that is the last one", "vector_unit",
        "restart | (group > largest)", "1",
        "test_vector_unit:test_stalls_change_nothing",
    ),
]  # fmt: skip


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The hardware with a fault in it."""
    # all units first: one that is imported while a fault is planted would keep its function
    importlib.import_module("nomatmul.hardware.rtl.top")
    module = importlib.import_module(f"nomatmul.hardware.rtl.{fault.module}")
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    count = source.count(fault.old)
    assert count == 1, f"{fault.name}: its text is there {count} times"
    assert fault.old.count("\n") == fault.new.count("\n")  # so that other functions stay equal
    changed = ModuleType(module.__name__)
    changed.__file__ = module.__file__
    code = compile(source.replace(fault.old, fault.new), module.__file__, "exec", dont_inherit=True)
    exec(code, changed.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        found = _replace(patch, module, changed)
        assert len(found) == 1, f"{fault.name}: it changes {found}"
        yield


def _replace(patch: pytest.MonkeyPatch, module: ModuleType, changed: ModuleType) -> list[str]:
    """Put the functions that differ in the place of the sound ones; their names."""
    found = []
    owners = [(module, changed)]
    for name, value in vars(changed).items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            owners.append((getattr(module, name), value))
    for sound, other in owners:
        for name, value in list(vars(other).items()):
            old = vars(sound).get(name)
            if not isinstance(value, FunctionType) or not isinstance(old, FunctionType):
                continue
            if value.__module__ == module.__name__ and value.__code__ != old.__code__:
                patch.setattr(sound, name, value)
                found.append(name)
    return found
