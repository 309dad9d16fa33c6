"""CUDA C++ compiled at run time: NVRTC (which torch's GPU wheels bring) and the driver, by ctypes.

Compiled code is kept in the user's cache directory (XDG_CACHE_HOME, default ~/.cache, under
nomatmul/), named by everything that went into it; a cache that cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class CompileError(RuntimeError):
    """NVRTC or the driver refused; the text says why."""


def compile_cubin(
    file: str, defines: dict[str, str], capability: tuple[int, int], suffix: str = ""
) -> bytes:
    """Return machine code for one chip of a .cu file beside this module. Raises CompileError.

    It may include the .cuh files that lie there, too.

    suffix: "a" for instructions that only this very capability has.
    """
    here = Path(__file__).parent
    source = (here / file).read_text()
    headers = {path.name: path.read_text() for path in sorted(here.glob("*.cuh"))}
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}{suffix}",
        "--std=c++17",
        "--fmad=false",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    ]
    library = _library()
    version = (ctypes.c_int(), ctypes.c_int())
    _check(library, library.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1])))
    parts = [source, *headers.values(), *options, f"{version}"]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    kept = _cache() / f"{Path(file).stem}-{key}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    cubin = _compiled(library, file, source, headers, options)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".part-{os.getpid()}")
        part.write_bytes(cubin)
        os.replace(part, kept)
    return cubin


def _compiled(
    library: Any, file: str, source: str, headers: dict[str, str], options: list[str]
) -> bytes:
    program = ctypes.c_void_p()
    count = len(headers)
    names = (ctypes.c_char_p * count)(*(name.encode() for name in headers))
    contents = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), file.encode(), count, contents, names
    )
    _check(library, made)
    try:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), texts)
        if status:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            lines = log.decode(errors="replace").strip().splitlines()
            first = next((line for line in lines if "error" in line), "no message")
            raise CompileError(f"NVRTC cannot compile {file}: {first}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Any, get: Any, program: Any) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def _library() -> Any:
    """libnvrtc: of the wheels beside torch, or of the system."""
    paths: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        paths += sorted(glob.glob(f"{place}/*/lib/libnvrtc.so.*"), reverse=True)
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root:
            paths += sorted(glob.glob(f"{root}/lib64/libnvrtc.so.*"), reverse=True)
    for path in [*paths, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        if ".alt" in path or "builtins" in path:
            continue
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    raise CompileError("libnvrtc is not found beside torch")


def _check(library: Any, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


def cache_file(name: str, content: bytes, suffix: str) -> Path:
    """A file in the cache that belongs to some machine code."""
    return _cache() / f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nomatmul"


class Kernel:
    """One kernel of a cubin, with the dynamic shared memory that its `shared_bytes` asks for."""

    _SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    def __init__(self, cubin: bytes, name: str) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._cubin = cubin
        self._do("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._do("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        self.shared_bytes = self._constant("shared_bytes")
        shared = ctypes.c_int(self.shared_bytes)
        self._do("cuFuncSetAttribute", self._function, self._SHARED_ATTRIBUTE, shared)

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Any],
        stream: int,
        cooperative: bool = False,
    ) -> None:
        """Queue the kernel on a stream (its handle) with ctypes values as arguments.

        cooperative: all blocks run at the same time, or CompileError says that they cannot.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        shape = map(ctypes.c_uint, (*grid, 1, threads, 1, 1, self.shared_bytes))
        more = () if cooperative else (None,)
        self._do(
            "cuLaunchCooperativeKernel" if cooperative else "cuLaunchKernel",
            self._function,
            *shape,
            ctypes.c_void_p(stream),
            addresses,
            *more,
        )

    def _constant(self, name: str) -> int:
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        self._do(
            "cuModuleGetGlobal_v2",
            ctypes.byref(address),
            ctypes.byref(size),
            self._module,
            name.encode(),
        )
        self._do("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value

    def _do(self, call: str, *arguments: Any) -> None:
        status = getattr(self._driver, call)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise CompileError(f"{call}: {(text.value or b'unknown').decode()}")
