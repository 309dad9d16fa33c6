"""Large blocks go back to the system, whatever lies behind them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from nomatmul.serve.allocator import return_large_blocks
if sys.argv[1] == "yes":
    assert return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # glibc now takes such blocks from the heap
blocks, behind = [], []
for _ in range(8):
    blocks.append(libc.malloc(8 << 20))
    ctypes.memset(blocks[-1], 1, 8 << 20)
    behind.append(libc.malloc(200 << 10))
for block in blocks:
    libc.free(block)
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_large_blocks_go_back_at_once():
    kib = {
        word: int(subprocess.check_output([sys.executable, "-c", SCRIPT, word]))
        for word in ("yes", "no")
    }
    assert kib["no"] - kib["yes"] > 40 << 10


PAGES = """
import ctypes, sys
from nomatmul.serve.allocator import return_free_pages, return_large_blocks
assert return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = []
for _ in range(400):
    blocks.append((libc.malloc(100 << 10), libc.malloc(2000)))
    ctypes.memset(blocks[-1][0], 1, 100 << 10)
for large, _ in blocks:
    libc.free(large)
if sys.argv[1] == "yes":
    assert return_free_pages()
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_free_pages_between_small_blocks_go_back_when_asked_for():
    kib = {
        word: int(subprocess.check_output([sys.executable, "-c", PAGES, word]))
        for word in ("yes", "no")
    }
    assert kib["no"] - kib["yes"] > 30 << 10
