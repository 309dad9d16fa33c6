"""The whole accelerator in Amaranth's simulator, with a memory and a host's bus.

    machine = Machine(design, image)
    machine.host(program, reads_and_writes)   # an async function of (bus), see Bus

It is slow, a thousand cycles a second: long runs belong into Verilator (hardware.simulate).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from amaranth.sim import Simulator
from hardware.interpreter import Writes

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.disassemble import assemble
from nomatmul.hardware.registers import Control, Register, Status
from nomatmul.hardware.rtl.top import Accelerator

LATENCY = 7  # cycles from a burst's request to its first word


def small(**values: Any) -> Design:
    """The smallest design that can do everything but trees."""
    sizes = {"lanes": 32, "element_lanes": 4, "memory_bits": 64, "fifo_words": 16, "burst": 4}
    sizes |= {"vector_words": 256, "parameter_words": 256, "state_words": 128}
    sizes |= {"activation_beats": 8, "program_words": 64, "combine_lanes": 4, "tree_rows": 16}
    return Design(**(sizes | {"probe": True} | values))


class Bus:
    """The host's side of Wishbone: every access must end within a few cycles."""

    def __init__(self, ctx: Any, machine: Machine) -> None:
        self._ctx, self._machine = ctx, machine
        self._bus = machine.top.bus

    async def _access(self, address: int, write: bool, value: int) -> int:
        ctx, bus = self._ctx, self._bus
        for signal, now in ((bus.cyc, 1), (bus.stb, 1), (bus.we, write), (bus.adr, address)):
            ctx.set(signal, now)
        ctx.set(bus.dat_w, value)
        for _ in range(8):
            *_, ack, data = await ctx.tick().sample(bus.ack, bus.dat_r)
            if ack:
                break
        else:
            raise AssertionError(f"no answer from register {address}")
        for signal in (bus.cyc, bus.stb, bus.we):
            ctx.set(signal, 0)
        await ctx.tick()
        return int(data)

    async def read(self, address: int) -> int:
        """The register's 32 bits."""
        return await self._access(address, False, 0)

    async def write(self, address: int, value: int) -> None:
        """Write 32 bits."""
        await self._access(address, True, value & 0xFFFFFFFF)

    async def load(self, lines: Sequence[str | int], *, run: bool = True) -> None:
        """Write a program from instruction 0 on: lines of assembly, or words of 128 bits."""
        await self.write(Register.PROGRAM_ADDRESS, 0)
        for line in lines:
            word = line if isinstance(line, int) else isa.encode(assemble(line))
            for part in range(4):
                await self.write(Register.PROGRAM_DATA, word >> (32 * part))
        if run:
            await self.write(Register.CONTROL, Control.RUN)

    async def wait(self, mask: int, *, limit: int = 4000) -> int:
        """STATUS as soon as one of the bits is set."""
        for _ in range(limit // 5):
            status = await self.read(Register.STATUS)
            if status & mask:
                return status
        raise AssertionError(f"status is {status:#x}, none of {mask:#x}")

    async def wait_tokens(self, count: int, *, limit: int = 40000) -> None:
        """Until so many tokens were taken, and the machine waits for the next."""
        for _ in range(limit // 10):
            taken = await self.read(Register.TOKENS)
            status = await self.read(Register.STATUS)
            if taken == count and status & (Status.WAITING | Status.HALTED):
                return
        raise AssertionError(f"{taken} of {count} tokens, status {status:#x}")

    async def signed(self, address: int) -> int:
        """The register as a signed number."""
        value = await self.read(address)
        return value - ((value & 0x80000000) << 1)

    async def tick(self, cycles: int) -> None:
        """Let it run."""
        await self._ctx.tick().repeat(cycles)


class Machine:
    """`image`: bytes of the memory; beyond them every word is zeros with an error."""

    def __init__(self, design: Design, image: bytes = b"") -> None:
        self.design, self.image = design, image
        self.top = Accelerator(design)
        self.retired: list[tuple[int, Writes]] = []  # each instruction, and what it wrote
        self.frozen = False  # the memory answers nothing
        self._simulator = Simulator(self.top)
        self._simulator.add_clock(1e-8)
        self._simulator.add_testbench(self._memory, background=True)

    def host(self, steps: Callable[[Bus], Awaitable[None]]) -> None:
        """Run the host's side to its end."""

        async def bench(ctx: Any) -> None:
            await steps(Bus(ctx, self))

        self._simulator.add_testbench(bench)
        if self.design.probe:
            self._simulator.add_testbench(self._watch, background=True)
        self._simulator.run()

    async def _memory(self, ctx: Any) -> None:
        port, width = self.top.memory, self.design.memory_bytes
        waiting: deque[list[int]] = deque()  # from which cycle, address, words left
        cycle, shown = 0, False
        ctx.set(port.request.ready, 1)
        while True:
            *_, asked, request, taken = await ctx.tick().sample(
                port.request.valid, port.request.payload, port.response.ready
            )
            cycle += 1
            if asked:
                waiting.append([cycle + LATENCY, request.address, request.length])
            shown &= not taken
            if shown:
                continue
            ctx.set(port.response.valid, 0)
            if waiting and waiting[0][0] <= cycle and not self.frozen:
                burst = waiting[0]
                at = burst[1] * width
                error = at + width > len(self.image)
                word = 0 if error else int.from_bytes(self.image[at : at + width], "little")
                burst[1:] = burst[1] + 1, burst[2] - 1
                last = burst[2] == 0
                if last:
                    waiting.popleft()
                ctx.set(port.response.payload, {"data": word, "error": error, "last": last})
                ctx.set(port.response.valid, 1)
                shown = True

    async def _watch(self, ctx: Any) -> None:
        """Gather what each instruction wrote, in the form of interpreter.py."""
        probe, lanes = self.top.probe, self.design.element_lanes
        names = {
            "scalar": ("valid", "address", "m", "e"),
            "vector": ("valid", "address", "data"),
            "state": ("valid", "address", "data"),
            "activation": ("valid", "address", "data"),
            "parameter": ("valid", "address", "data", "mask"),
            "logit": ("valid", "value", "last"),
            "retired": ("valid", "index"),
        }
        signals = [getattr(getattr(probe, kind), name) for kind in names for name in names[kind]]
        writes: Writes = {}
        logits = 0
        while True:
            values = (await ctx.tick().sample(*signals))[2:]
            at = 0
            for kind, fields in names.items():
                valid, *event = values[at : at + len(fields)]
                at += len(fields)
                if not valid:
                    continue
                if kind == "scalar":
                    writes["scalar", event[0]] = event[1], event[2]
                elif kind in ("vector", "state"):
                    writes[kind, event[0]] = event[1]
                elif kind in ("activation", "parameter"):
                    mask = event[2] if kind == "parameter" else -1
                    for lane in range(lanes):
                        if mask >> lane & 1:
                            writes[kind, event[0] * lanes + lane] = event[1][lane]
                elif kind == "logit":
                    writes["logit", logits] = event[0]
                    logits = 0 if event[1] else logits + 1
                else:
                    self.retired.append((event[0], writes))
                    writes = {}
