"""Weights of a packed model in memory: one arena of huge pages, or the mapped file.

Bytes go from the file straight into their final place and are verified there, tensor by tensor,
by several threads (reading and checksums run without the GIL). What the core re-arranges is read
when it asks for it, a tensor a thread. So loading never holds a second copy of anything large.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.native import native
from nomatmul.formats.errors import FormatError

if TYPE_CHECKING:
    from nomatmul.formats.packed.reader import PackedReader

ALIGN = 64  # a cache line
DTYPES = {
    "U8": np.uint8,
    "I8": np.int8,
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}


# How the names of an encoder's task heads begin; they are not in the graph.
HEADS = ("head.", "pooler.", "classifier.")


class Weights:
    """Tensors of one model by name, and what keeps their memory alive.

    `arrays` maps a name (formats/packed/layout.py) to an array of its stored dtype and shape,
    bfloat16 as uint16 bits. `arena` is the native Arena, None where there is none. `sizes`: bytes
    of each tensor as it lies in memory while the model computes.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        arena: Any = None,
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.arrays, self.arena = arrays, arena
        self.sizes = {n: a.nbytes for n, a in arrays.items()} if sizes is None else sizes

    def bytes_by_part(self) -> dict[str, int]:
        """{part: bytes}: of decoders "embedding", "core", "head", "norms"; of encoders "dense" and
        "trees" in place of "core"."""
        return bytes_by_part(self.sizes)


def bytes_by_part(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sum {tensor: bytes} by part; see Weights.bytes_by_part."""
    ternary = any(name.endswith(".packed") for name in sizes)
    found: dict[str, int] = {}
    for name, size in sizes.items():
        part = _part_of(name, ternary, size)
        found[part] = found.get(part, 0) + size
    return {part: found[part] for part in _PARTS if part in found}


_FEW_BYTES = 8  # one or two scales of a whole matrix go with the vectors, not with its codes
_PARTS = ("embedding", "core", "trees", "dense", "head", "norms")


def _part_of(name: str, ternary: bool, size: int) -> str:
    if name.startswith("embedding."):
        return "embedding"
    if "norm" in name or name == "position_scale":
        return "norms"
    if ternary:
        if size <= _FEW_BYTES:
            return "norms"
        if name.startswith("head."):
            return "head"
        return "core" if name.endswith((".packed", ".weight", ".scale")) else "norms"
    if name.startswith(("pooler.", "classifier.")):
        return "head"
    return "trees" if name.endswith((".rows", ".row_scale", "channel.bias")) else "dense"


def allocate(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Weights:
    """Return zeroed Weights for {name: (safetensors dtype, shape)}, laid out in that order.

    Raises MemoryError when the machine does not have so much.
    """
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        for name, (dtype, shape) in tensors.items()
    }
    arena = native().Arena(sum(-(-size // ALIGN) * ALIGN for size in sizes.values()))
    memory, offset = arena.view(), 0
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape) in tensors.items():
        part = memory[offset : offset + sizes[name]]
        arrays[name] = part.view(DTYPES[dtype]).reshape(shape)
        offset += -(-sizes[name] // ALIGN) * ALIGN
    return Weights(arrays, arena)


def read_weights(
    reader: PackedReader,
    *,
    verify: bool = True,
    threads: int = 1,
    rearranged: Collection[str] = (),
    mapped: Collection[str] = (),
) -> Weights:
    """Read the tensors of a packed directory into one arena, but for the rearranged ones: those are
    read each time that they are asked for, and may be asked for by several threads. The mapped
    ones, floats of which few rows are ever looked at, stay in the file.

    Raises FormatError for bytes that do not match their checksum, illegal codes, values that
    are not finite, or a file that ends early.
    """
    elsewhere = {*rearranged, *mapped}
    infos = {name: info for name, info in reader.infos.items() if name not in elsewhere}
    weights = allocate({name: (info.dtype, info.shape) for name, info in infos.items()})

    def read(name: str) -> None:
        flat = weights.arrays[name].reshape(-1)
        reader.read_into(name, flat)
        if verify:
            verify_tensor(reader, name, weights.arrays[name])

    in_threads(read, largest_first({n: info.nbytes for n, info in infos.items()}), threads)
    if mapped:
        kept = {**weights.arrays, **{name: _mapped(reader, name, verify) for name in mapped}}
        weights = Weights(kept, weights.arena)
    if not rearranged:
        return weights
    later = _OneByOne(reader, rearranged, verify)
    return Weights(Joined(weights.arrays, later), weights.arena, panel_sizes(reader, rearranged))


def _mapped(reader: PackedReader, name: str, verify: bool) -> NDArray[Any]:
    """A tensor in the file; what was looked at to verify it does not count as memory."""
    info, memory = reader.infos[name], _map(reader)
    array = np.frombuffer(memory, np.uint8, info.nbytes, info.offset)

    def passed(first: int, end: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            start, stop = ((info.offset + at) // mmap.PAGESIZE for at in (first, end))
            if stop > start:
                page = mmap.PAGESIZE
                memory.madvise(mmap.MADV_DONTNEED, start * page, (stop - start) * page)

    if verify:
        reader.verify_floats(name, array, passed)
    return array.view(DTYPES[info.dtype]).reshape(info.shape)


def _map(reader: PackedReader) -> mmap.mmap:
    try:
        with open(reader.weights_path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"cannot map {reader.weights_path}: {error.strerror or error}") from None


def panel_sizes(reader: PackedReader, rearranged: Collection[str]) -> dict[str, int]:
    """Bytes of each tensor in memory: codes that are rearranged have two bits a value."""
    sizes = {name: info.nbytes for name, info in reader.infos.items()}
    for name in rearranged:
        if name in reader.matrices:
            sizes[name] = reader.infos[name].shape[0] * reader.matrices[name][0] // 4
    return sizes


def map_weights(reader: PackedReader, *, verify: bool = True, threads: int = 1) -> Weights:
    """Map the weights file, so that processes share one copy. Raises as `read_weights`."""
    memory = np.frombuffer(_map(reader), dtype=np.uint8)
    arrays: dict[str, NDArray[Any]] = {}
    for name, info in reader.infos.items():
        part = memory[info.offset : info.offset + info.nbytes]
        if info.dtype == "F32" and part.ctypes.data % 4:
            part = part.copy()  # a file of another writer may have them unaligned; they are small
        arrays[name] = part.view(DTYPES[info.dtype]).reshape(info.shape)
    weights = Weights(arrays)
    if verify:
        in_threads(
            lambda name: verify_tensor(reader, name, arrays[name]),
            largest_first({name: info.nbytes for name, info in reader.infos.items()}),
            threads,
        )
    return weights


class _OneByOne(Mapping[str, NDArray[Any]]):
    """Tensors that are read and verified each time that they are asked for."""

    def __init__(self, reader: PackedReader, names: Collection[str], verify: bool = True) -> None:
        self._reader, self._names, self._verify = reader, names, verify

    def __getitem__(self, name: str) -> NDArray[Any]:
        info = self._reader.infos[name]
        array = np.empty(info.shape, DTYPES[info.dtype])
        self._reader.read_into(name, array.reshape(-1))
        if self._verify:
            verify_tensor(self._reader, name, array)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(Mapping[str, NDArray[Any]]):
    """Tensors that lie in memory, and others that are made when they are asked for."""

    def __init__(self, kept: Mapping[str, NDArray[Any]], later: Mapping[str, NDArray[Any]]) -> None:
        self._kept, self._later = kept, later

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._later[name] if name in self._later else self._kept[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._later
        yield from self._kept

    def __len__(self) -> int:
        return len(self._later) + len(self._kept)


def read_one_by_one(reader: PackedReader) -> Weights:
    """An encoder's tensors: the core widens bfloat16 to float32 and needs the stored one no more,
    so only one of them is in memory at a time."""
    return Weights(_OneByOne(reader, reader.infos), sizes=encoder_sizes(reader))


def encoder_sizes(reader: PackedReader) -> dict[str, int]:
    """Bytes of each tensor of an encoder in memory; dense bfloat16 matrices are widened."""
    parts = {name: _part_of(name, False, info.nbytes) for name, info in reader.infos.items()}
    return {
        name: info.nbytes * (2 if info.dtype == "BF16" and parts[name] in ("dense", "head") else 1)
        for name, info in reader.infos.items()
    }


def verify_tensor(reader: PackedReader, name: str, array: NDArray[Any]) -> None:
    """Check one tensor's bytes; the codes of packed rows natively. Raises FormatError."""
    reader.verify(name, array.reshape(-1), codes=False)
    if name.endswith(".packed"):
        columns, form = reader.matrices[name]
        if not native().rows_ok(form, array.reshape(-1, array.shape[-1]), columns):
            raise FormatError(
                f"{reader.weights_path}: {name} holds an illegal code or wrong padding"
            )


def largest_first(sizes: Mapping[str, int]) -> list[str]:
    """Names in the order in which threads take them best."""
    return sorted(sizes, key=lambda name: -sizes[name])


def in_threads(work: Callable[[str], None], names: Iterable[str], threads: int) -> None:
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
            except BaseException as error:  # raised again by who waits for all
                errors.append(error)

    helpers = [threading.Thread(target=run, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
