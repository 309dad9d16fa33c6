"""Formal proofs by Yosys' own SAT solver: `prove(spec, depth=...)`.

A spec is an Elaboratable that holds the component and says `Assert` and `Assume` about it (from
`amaranth.hdl`) in `m.d.comb`. Signals that the solver is to choose freely each cycle come from
`free`, constants that it chooses once from `watched`. Time starts at the initial values of all
registers, without reset.

`prove(..., induction=False)` holds for the first `depth` cycles only; with induction it holds
for ever, and `depth` is the longest induction that is tried.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from amaranth import Module, Signal
from amaranth.asserts import AnyConst, AnySeq
from amaranth.back import rtlil
from amaranth.hdl import Assert, Assume

from nomatmul.hardware.tools import tool


def free(m: Module, shape: Any, name: str = "free") -> Signal:
    """A signal that may take any value in each cycle."""
    signal = Signal(shape, name=name)
    bits = _bits(signal)
    m.d.comb += bits.eq(AnySeq(len(bits)))
    return signal


def watched(m: Module, shape: Any, name: str = "watched") -> Signal:
    """A signal of any value that stays the same for ever."""
    signal = Signal(shape, name=name)
    bits = _bits(signal)
    m.d.comb += bits.eq(AnyConst(len(bits)))
    return signal


def assume_stream(m: Module, stream: Any, name: str = "input") -> None:
    """Drive a stream into a component: any beats, with the rule that an untaken one stays."""
    bits = _bits(stream.payload)
    m.d.comb += [
        stream.valid.eq(AnySeq(1)),
        bits.eq(AnySeq(len(bits))),
    ]
    _held(m, stream, bits, Assume, name)


def assume_held(m: Module, stream: Any, name: str = "input") -> None:
    """The same rule for a stream whose valid and payload the caller drives."""
    _held(m, stream, _bits(stream.payload), Assume, name)


def assert_stream(m: Module, stream: Any, name: str = "output") -> None:
    """The rule of streams: a beat that is valid and not taken stays, valid and unchanged."""
    bits = _bits(stream.payload)
    _held(m, stream, bits, Assert, name)


def depths(short: int, long: int) -> Any:
    """Marks a test with `depth`: the short one always, the long one with `make hardware`."""
    return pytest.mark.parametrize("depth", [short, pytest.param(long, marks=pytest.mark.slow)])


def prove(spec: Any, *, depth: int, induction: bool = True, timeout: int = 600) -> None:
    """Prove the spec's assertions under its assumptions; AssertionError with Yosys' answer."""
    holds, text = answer(spec, depth=depth, induction=induction, timeout=timeout)
    assert holds, text[-6000:]


def answer(
    spec: Any, *, depth: int, induction: bool = True, timeout: int = 600
) -> tuple[bool, str]:
    """Whether the assertions are proved, and what Yosys said. A tool's failure raises."""
    with TemporaryDirectory() as folder:
        design = Path(folder) / "design.il"
        design.write_text(rtlil.convert(spec, name="spec", ports=()))
        how = "-tempinduct" if induction else "-tempinduct-baseonly"
        script = "; ".join(
            [
                "read_rtlil design.il",
                "hierarchy -top spec",
                "proc",
                "flatten",
                "memory_map",
                "setundef -undriven -anyseq",
                "chformal -lower",
                "opt_clean",
                "select -assert-min 1 t:$assert",  # a spec that says nothing is no proof
                f"sat {how} -set rst 0 -set-assumes -prove-asserts"
                f" -maxsteps {depth} -show-public spec",
            ]
        )
        done = subprocess.run(
            [tool("yosys"), "-p", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            cwd=folder,  # Yosys as WebAssembly sees a /tmp of its own
        )
    if done.returncode:
        raise RuntimeError(f"yosys failed: {done.stdout[-3000:]}")
    return "SUCCESS" in done.stdout, done.stdout


def _bits(signal: Any) -> Any:
    return signal.as_value() if hasattr(signal, "as_value") else signal


def _held(m: Module, stream: Any, bits: Any, claim: Any, name: str) -> None:
    waits = Signal(name=f"{name}_waits")
    kept = Signal(len(bits), name=f"{name}_kept")
    m.d.sync += [waits.eq(stream.valid & ~stream.ready), kept.eq(bits)]
    with m.If(waits):
        m.d.comb += [claim(stream.valid), claim(bits == kept)]
