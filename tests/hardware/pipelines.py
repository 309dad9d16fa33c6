"""Feeds a pipeline without control a row of inputs, one a cycle, and gives what comes out."""

from __future__ import annotations

from typing import Any

from amaranth.sim import Simulator


def through(
    component: Any, latency: int, inputs: list[dict[str, int]], outputs: list[str]
) -> list[tuple[int, ...]]:
    """Outputs `latency` cycles after each input; inputs change every cycle."""
    simulator = Simulator(component)
    simulator.add_clock(1e-6)
    got: list[tuple[int, ...]] = []

    async def bench(ctx: Any) -> None:
        for cycle in range(len(inputs) + latency):
            if cycle < len(inputs):
                for name, value in inputs[cycle].items():
                    ctx.set(getattr(component, name), value)
            if cycle >= latency:
                got.append(tuple(ctx.get(getattr(component, name)) for name in outputs))
            await ctx.tick()

    simulator.add_testbench(bench)
    simulator.run()
    return got
