"""The whole accelerator runs programs, and every write is the integer reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
from hardware.interpreter import Interpreter, pack_rows, pad
from hardware.machine import Bus, Machine, small

from nomatmul.hardware.design import Design
from nomatmul.hardware.disassemble import assemble
from nomatmul.hardware.registers import (
    COUNTERS,
    Control,
    Register,
    Status,
    TokenFlag,
    counter_address,
)

D, M, V = 40, 24, 11  # sizes of the model below: hidden, intermediate, vocabulary


class Image:
    """A memory's bytes, region by region."""

    def __init__(self, design: Design, seed: int) -> None:
        self.design, self.data = design, b""
        self.rng = np.random.default_rng(seed)

    def add(self, region: bytes) -> tuple[int, int]:
        """(address, words) of a region."""
        at = len(self.data) // self.design.memory_bytes
        region = pad(self.design, region)
        self.data += region
        return at, len(region) // self.design.memory_bytes

    def ternary(self, rows: int, columns: int) -> int:
        """Words of a matrix that the stream has next."""
        values = self.rng.integers(-1, 2, (rows, columns))
        return self.add(pack_rows(self.design, values))[1]

    def parameters(self, count: int, least: int = -30000) -> int:
        """Words of int16 that the stream has next."""
        values = self.rng.integers(least, 30001, count).astype("<i2")
        return self.add(values.tobytes())[1]


def one_layer(design: Design, seed: int) -> tuple[bytes, list[str]]:
    """A model of one layer, MLGRU and GLU, with a head: numbers at random, forms as compiled."""
    image = Image(design, seed)
    stride = -(-(8 + D) // design.memory_bytes)
    for _ in range(V):
        scale = np.array([(1 << 23) + int(image.rng.integers(1 << 23)), -28], "<i4").tobytes()
        image.add(scale + image.rng.integers(-127, 128, D).astype(np.int8).tobytes())
    body = len(image.data) // design.memory_bytes
    beats, wide = design.beats(D), design.beats(M)
    words = image.parameters(D) + image.parameters(D) + image.parameters(D, 0)
    words += image.ternary(3 * D, D) + image.ternary(D, D)
    words += image.ternary(2 * M, D) + image.ternary(D, M)
    head = body + words
    head_words = image.ternary(V, D)
    fold = "SDIV sd=2 sa=30 sb=1 | SMUL sd=3 sa=1 sb=31"
    text = f"""
        SCONST sd=30 m={127 << 17} e=-17 | SCONST sd=31 m={1 << 23} e=-34
        TOKEN tokens={V}
        EMBED base=0 stride={stride} words={stride} rows={D} dst=0 fraction=12
        STREAM address={body} words={words}
        LOADP dst=0 count={D} | LOADP dst=40 count={D} | LOADP dst=80 count={D}
        SCAN sd=1 src=0 count={D} w=0 | {fold}
        QUANT dst=0 src=0 count={D} sa=1 sr=2 w=0
        QUANT dst={beats} src=0 count={D} sa=1 sr=2 w=0
        QUANT dst={2 * beats} src=0 count={D} sa=1 sr=2 ones
        SMUL sd=4 sa=3 sb=3 | SADD sd=4 sa=4 sb=3 | SCONST sd=5 m=9000000 e=-35
        PRODUCT rows={3 * D} beats={beats} slots=3 act=0 epilogue=mlgru m=3 dst=40 aux=40 lb=80 \
bounded fraction=12 u_shift=12 dst2=80
        SUMSQ sd=6 src=80 count={D} sa=1 ones | SCAN sd=1 src=40 count={D} w=40
        SUMSQ sd=7 src=40 count={D} sa=1 w=40 | SSQRT sd=8 sa=7 | {fold}
        QUANT dst=0 src=40 count={D} sa=1 sr=2 w=40
        PRODUCT rows={D} beats={beats} slots=1 act=0 epilogue=add m=3 dst=0 aux=0 fraction=10
        SCAN sd=1 src=0 count={D} ones | {fold} | SMUL sd=4 sa=3 sb=30
        QUANT dst=0 src=0 count={D} sa=1 sr=2 ones
        QUANT dst={beats} src=0 count={D} sa=1 sr=2 ones
        PRODUCT rows={2 * M} beats={beats} slots=2 act=0 epilogue=glu m=3 dst=40 \
fraction=12 u_shift=9
        SCAN sd=1 src=40 count={M} ones | {fold}
        QUANT dst=0 src=40 count={M} sa=1 sr=2 ones
        PRODUCT rows={D} beats={wide} slots=1 act=0 epilogue=add m=3 dst=0 aux=0 fraction=12
        SKIP target=2
        STREAM address={head} words={head_words}
        SCAN sd=1 src=0 count={D} ones | {fold} | QUANT dst=0 src=0 count={D} sa=1 sr=2 ones
        PRODUCT rows={V} beats={beats} slots=1 act=0 epilogue=logits m=3 fraction=14
        JUMP target=2"""
    return image.data, [line.strip() for line in text.replace("\n", "|").split("|") if line.strip()]


def run(design: Design, image: bytes, lines: list[str], tokens: list[tuple[int, int, int]]) -> Any:
    """The machine, after all tokens; [each answer's logits]; status."""
    machine, answers, status = Machine(design, image), [], []

    async def steps(bus: Bus) -> None:
        await bus.load(lines)
        for token, want, fresh in tokens:
            word = token | want * TokenFlag.WANT_LOGITS | fresh * TokenFlag.FRESH
            await bus.write(Register.TOKEN, word)
        await bus.wait_tokens(len(tokens))
        while waiting := await bus.read(Register.LOGITS_WAITING):
            answers.extend([await bus.signed(Register.LOGIT) for _ in range(waiting)])
        status.append(await bus.read(Register.STATUS))
        status.append(await bus.read(Register.ARGMAX))
        await bus.write(Register.CONTROL, Control.FREEZE)
        counters = [await bus.read(counter_address(name)) for name in COUNTERS]
        status.append(dict(zip(COUNTERS, counters, strict=True)))

    machine.host(steps)
    return machine, answers, status


def test_a_model_of_one_layer_writes_what_the_reference_writes() -> None:
    design = small()
    image, lines = one_layer(design, 1)
    tokens = [(3, 0, 1), (10, 1, 0)]
    machine, answers, (status, argmax, counts) = run(design, image, lines, tokens)
    wanted = Interpreter(design, image, tokens).run([assemble(line) for line in lines])
    for (at, writes), (at_wanted, writes_wanted) in zip(machine.retired, wanted, strict=False):
        assert at == at_wanted
        assert writes == writes_wanted, f"instruction {at}: {lines[at]}"
    assert len(machine.retired) == len(wanted)
    logits = [w["logit", k] for _, w in wanted if ("logit", 0) in w for k in range(V)]
    assert answers == logits
    assert argmax == int(np.argmax(logits[-V:]))
    assert status & ~Status.SATURATED & ((1 << 16) - 1) == 0
    causes = COUNTERS[1 : COUNTERS.index("instructions")]
    assert sum(counts[name] for name in causes) == counts["cycles"]
    assert counts["instructions"] == len(wanted)
