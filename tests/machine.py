"""What a machine may lack: the only reasons for which a test is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


def need_triton() -> None:
    """Skip the test, or the module that is being imported, where triton has no build."""
    if sys.platform != "linux":
        pytest.skip(f"triton has no build for {sys.platform}", allow_module_level=True)


def need_compiler(name: str) -> str:
    """Return the path of a compiler; skips the test where the machine has none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"the machine has no compiler {name}")
    return path


def need_simde() -> str:
    """Return the path of a C++ compiler that finds SIMDe's headers; skips the test without."""
    compiler = need_compiler(os.environ.get("CXX", "c++"))
    probe = [compiler, "-x", "c++", "-fsyntax-only", "-include", "simde/x86/avx512.h", os.devnull]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("the machine's compiler has no headers of SIMDe (Debian: libsimde-dev)")
    return compiler
