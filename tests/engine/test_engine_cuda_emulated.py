"""The persistent kernel of decode.cu on a CPU: emulate_cuda.h stands in for the GPU.

Two or three blocks of one to three warps (and the one that copies) compute tokens of tiny models;
their logits, states and likeliest tokens have the bits of the native core.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import random_ids, state_of
from machine import need_compiler, need_triton

from nomatmul.engine import load
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader

need_triton()

COPYING = 32  # threads of a block beside those that compute
HERE = Path(__file__).parent
DRIVER = """
#include "emulate_cuda.h"
#include "decode.cu"
constexpr int kAll = THREADS + 32;
extern "C" void run(const Params* p) {
  std::vector<std::unique_ptr<emulated::Block>> blocks;
  std::vector<std::thread> threads;
  for (int b = 0; b < BLOCKS; ++b) {
    blocks.push_back(std::make_unique<emulated::Block>(kAll));
    std::memset(blocks.back()->shared.data(), 0x7f, blocks.back()->shared.size());
    for (int t = 0; t < kAll; ++t)
      threads.emplace_back([p, b, t, block = blocks.back().get()] {
        emulated::block = block, blockIdx = {b, 0}, threadIdx = {t, 0};
        decode(*p);
      });
  }
  for (auto& thread : threads) thread.join();
}
"""


class Emulated:
    """Takes the place of nvrtc.Kernel."""

    def __init__(self, library: Path, threads: int) -> None:
        self._run = ctypes.CDLL(str(library)).run
        self._threads = threads

    def launch(
        self, grid: Any, threads: int, arguments: Sequence[Any], *more: Any, **_: Any
    ) -> None:
        assert threads == self._threads + COPYING
        self._run(ctypes.byref(arguments[0]))


def build(
    directory: Path, config: ModelConfig, embedding: int, blocks: int, threads: int
) -> Emulated:
    from nomatmul.engine.backends.cuda import decoder
    from nomatmul.engine.backends.cuda.plan import Plan

    compiler = need_compiler("g++")
    source, library = directory / "driver.cc", directory / "driver.so"
    source.write_text(DRIVER)
    macros = decoder.defines(Plan.of(config), embedding, blocks, threads)
    command = [
        *(compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread"),
        *("-DNOMATMUL_EMULATED", *(f"-D{name}={value}" for name, value in macros.items())),
        *(f"-I{HERE}", f"-I{Path(decoder.__file__).parent}", str(source), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Emulated(library, threads)


@pytest.mark.parametrize(
    ("size", "inner", "embedding", "blocks", "threads"),
    [
        (42, 51, "int8", 2, 32),
        (42, 0, "bf16", 3, 32),
        (42, 60, "bf16", 2, 64),
        (270, 0, "bf16", 5, 64),  # rows of several steps, more than one group a thread
    ],
)
def test_decoding_has_the_bits_of_the_native_core(
    make_packed: Callable[..., Path],
    tmp_path: Path,
    size: int,
    inner: int,
    embedding: str,
    blocks: int,
    threads: int,
) -> None:
    from nomatmul.engine.backends.cuda.decoder import Decoder
    from nomatmul.engine.backends.cuda.weights import read_weights

    config = ModelConfig(
        vocab_size=67,
        hidden_size=size,
        num_layers=2,
        intermediate_size=inner or None,
        channel_mixer="glu" if inner else "none",
    )
    directory = make_packed(config, "2bit", embedding)
    weights = read_weights(PackedReader(directory), torch.device("cpu"))
    kernel = build(tmp_path, config, {"bf16": 0, "int8": 1}[embedding], blocks, threads)
    flag = torch.zeros(1, dtype=torch.int32)
    decoder = Decoder(weights, flag, (kernel, blocks, threads))
    ids = random_ids(2, 67)[: 2 if size > 100 else None]
    lm = load(directory, threads=1)
    session = lm.session()
    before = torch.zeros(config.num_layers, config.hidden_size)
    for token in ids:
        after = torch.full_like(before, float("nan"))
        decoder.launch(int(token), before, after)
        expected_V = session.append([token])
        np.testing.assert_array_equal(decoder.fetch(), expected_V)
        np.testing.assert_array_equal(after.numpy(), state_of(session))
        assert int(decoder.out[-1]) == int(expected_V.argmax())
        before = after
    assert int(flag) == 0
    decoder.launch(decoder.out[-1:].clone(), before, torch.empty_like(before))
    np.testing.assert_array_equal(decoder.fetch(), session.append([int(expected_V.argmax())]))
    decoder._keep["items"].zero_()  # as after a launch whose blocks lost each other
    decoder.forget()
    decoder.launch(int(ids[0]), torch.zeros_like(before), torch.empty_like(before))
    np.testing.assert_array_equal(decoder.fetch(), lm.session().append(ids[:1]))
    before[1, 5] = float("inf")
    decoder.launch(1, before, torch.empty_like(before))
    assert int(flag) == 1
