"""Weights of a packed model in memory: one arena of huge pages, or the mapped file.

Bytes go from the file straight into their final place and are verified there, tensor by tensor,
by several threads (reading and checksums run without the GIL), so loading never holds a second
copy of anything large.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.native import native
from nomatmul.formats.errors import FormatError

if TYPE_CHECKING:
    from nomatmul.formats.packed.reader import PackedReader

ALIGN = 64  # a cache line
DTYPES = {"U8": np.uint8, "I8": np.int8, "BF16": np.uint16, "F32": np.float32}


class Weights:
    """Tensors of one model by name, and what keeps their memory alive.

    `arrays` maps a name (formats/packed/layout.py) to an array of its stored dtype and shape,
    bfloat16 as uint16 bits. `arena` is the native Arena, None when the file is mapped.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], arena: Any) -> None:
        self.arrays = arrays
        self.arena = arena

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def mapped(self) -> bool:
        """Whether the weights are the mapped file itself."""
        return self.arena is None


def allocate(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Weights:
    """Return zeroed Weights for {name: (safetensors dtype, shape)}, laid out in that order.

    Raises MemoryError when the machine does not have so much.
    """
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        for name, (dtype, shape) in tensors.items()
    }
    arena = native().Arena(sum(-(-size // ALIGN) * ALIGN for size in sizes.values()))
    memory, offset = arena.view(), 0
    arrays = {}
    for name, (dtype, shape) in tensors.items():
        part = memory[offset : offset + sizes[name]]
        arrays[name] = part.view(DTYPES[dtype]).reshape(shape)
        offset += -(-sizes[name] // ALIGN) * ALIGN
    return Weights(arrays, arena)


def read_weights(reader: PackedReader, *, verify: bool = True, threads: int = 1) -> Weights:
    """Read all tensors of a packed directory into one arena.

    Raises FormatError for bytes that do not match their checksum, illegal codes, values that
    are not finite, or a file that ends early.
    """
    weights = allocate({name: (info.dtype, info.shape) for name, info in reader.infos.items()})

    def read(name: str) -> None:
        flat = weights.arrays[name].reshape(-1)
        reader.read_into(name, flat)
        if verify:
            verify_tensor(reader, name, weights.arrays[name])

    _in_threads(read, _largest_first(reader), threads)
    return weights


def map_weights(reader: PackedReader, *, verify: bool = True, threads: int = 1) -> Weights:
    """Map the weights file, so that processes share one copy. Raises as `read_weights`."""
    try:
        with open(reader.weights_path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"cannot map {reader.weights_path}: {error.strerror or error}") from None
    memory = np.frombuffer(mapped, dtype=np.uint8)
    arrays: dict[str, NDArray[Any]] = {}
    for name, info in reader.infos.items():
        part = memory[info.offset : info.offset + info.nbytes]
        if info.dtype == "F32" and part.ctypes.data % 4:
            part = part.copy()  # a file of another writer may have them unaligned; they are small
        arrays[name] = part.view(DTYPES[info.dtype]).reshape(info.shape)
    weights = Weights(arrays, None)
    if verify:
        _in_threads(
            lambda name: verify_tensor(reader, name, arrays[name]), _largest_first(reader), threads
        )
    return weights


def verify_tensor(reader: PackedReader, name: str, array: NDArray[Any]) -> None:
    """Check one tensor's bytes; the codes of packed rows natively. Raises FormatError."""
    reader.verify(name, array.reshape(-1), codes=False)
    if name.endswith(".packed"):
        columns, form = reader.matrices[name]
        if not native().rows_ok(form, array.reshape(-1, array.shape[-1]), columns):
            raise FormatError(
                f"{reader.weights_path}: {name} holds an illegal code or wrong padding"
            )


def _largest_first(reader: PackedReader) -> list[str]:
    return sorted(reader.infos, key=lambda name: -reader.infos[name].nbytes)


def _in_threads(work: Callable[[str], None], names: Iterable[str], threads: int) -> None:
    """Call work(name) for all names on `threads` threads; raises the first error."""
    pending, lock = iter(names), threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with lock:
                name = next(pending, None)
            if name is None:
                return
            try:
                work(name)
            except BaseException as error:
                errors.append(error)

    helpers = [threading.Thread(target=run, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
