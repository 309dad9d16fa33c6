"""From a directory, or from nothing, to a LanguageModel."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.engine.backend import Backend, NativeBackend, NumpyBackend
from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.native import default_threads, native
from nomatmul.formats import capability
from nomatmul.formats.packed.encoder import EncoderReader, is_packed_encoder
from nomatmul.formats.packed.reader import PackedReader

if TYPE_CHECKING:
    from nomatmul.engine.encoder_model import EncoderModel

# The model in the box lies in the package itself.
BOX = Path(__file__).resolve().parent.parent / "box"


def load(
    path: str | Path | None = None,
    *,
    threads: int | None = None,
    isa: str | None = None,
    mmap: bool = False,
    verify: bool = True,
    device: str = "cpu",
    backend: str | None = None,
) -> Any:
    """Load a packed model directory; without a path, the model in the box.

    Returns a LanguageModel, or an EncoderModel where the directory holds an encoder (then isa,
    threads and backend have the same meaning, and there is no device but the CPU).

    threads: default the physical cores that this process may use. isa: an instruction set of
    `nomatmul doctor` (default the best one, or NOMATMUL_ISA). mmap: map the file, which several
    processes then share, instead of reading it into huge pages, which decodes faster. verify:
    check every byte (checksums, codes, finite values). backend: "native" (default) or "numpy",
    the slow oracle, which also steps in, with a warning, where the native core is missing.
    device: "cpu", or "cuda" or "cuda:1" for a GPU (needs torch and triton), where weights stay
    two bits in device memory; threads, isa, mmap and backend are about the CPU and refused there.

    Raises ValueError for a bad argument, and FormatError (a ValueError) for a directory that is
    missing, damaged, or holds a model that this engine does not run.
    """
    if path is not None and is_packed_encoder(path):
        if device != "cpu" or mmap:
            wrong = f"device {device!r}" if device != "cpu" else "mmap"
            raise ValueError(
                f"{path} is an encoder: the engine runs it on the CPU, without {wrong}"
            )
        return load_encoder(path, threads=threads, isa=isa, backend=backend)
    if device != "cpu":
        cpu_only = {"threads": threads, "isa": isa, "mmap": mmap or None, "backend": backend}
        return _load_on_device(_directory(path), device, verify, cpu_only)
    if backend not in (None, "native", "numpy"):
        raise ValueError(f'backend is {backend!r}; it must be "native" or "numpy"')
    threads = checked_threads(threads)
    directory = _directory(path)
    reader = PackedReader(directory)
    capability.check(reader.config, "native")
    chosen = backend or _available_backend()
    engine: Backend
    if chosen == "numpy":
        if isa is not None:
            raise ValueError(f'backend "numpy" has no instruction sets, got isa {isa!r}')
        engine = NumpyBackend(reader)
    else:
        engine = _native_backend(reader, threads, isa, mmap, verify)
    return LanguageModel(
        engine,
        reader.config,
        fingerprint=reader.fingerprint,
        packing=reader.packing,
        embedding_form=reader.embedding_form,
        path=directory,
        tokenizer_path=reader.tokenizer_path,
    )


def load_encoder(
    path: str | Path,
    *,
    threads: int | None = None,
    isa: str | None = None,
    backend: str | None = None,
) -> EncoderModel:
    """Load a packed encoder; arguments and errors as of `load`."""
    from nomatmul.engine.encoder_forward import EncoderForward, NativeEncoder, NumpyEncoder
    from nomatmul.engine.encoder_model import EncoderModel

    if backend not in (None, "native", "numpy"):
        raise ValueError(f'backend is {backend!r}; it must be "native" or "numpy"')
    threads = checked_threads(threads)
    reader = EncoderReader(path)
    engine: EncoderForward
    if (backend or _available_backend()) == "numpy":
        if isa is not None:
            raise ValueError(f'backend "numpy" has no instruction sets, got isa {isa!r}')
        count, engine = threads or 1, NumpyEncoder(reader)
    else:
        if isa is not None and isa not in native().kernels.isas():
            available = ", ".join(native().kernels.isas())
            raise ValueError(f"isa {isa!r} is not available here; available: {available}")
        count = threads if threads is not None else default_threads()
        engine = NativeEncoder(reader, count, isa)
    return EncoderModel(reader, engine, count)


def cuda_part(device: Any, **cpu_only: Any) -> Any:
    """Return the module of the GPU backend and the torch.device; the only way in.

    Raises ValueError for a device that cannot be used, or an argument that is about the CPU.
    """
    if not isinstance(device, str):
        raise ValueError(f'device must be a text such as "cuda", got {device!r}')
    for name, value in cpu_only.items():
        if value is not None and device.startswith("cuda"):
            raise ValueError(f"{name} is about the CPU; with device {device!r} leave it out")
    from nomatmul.engine.backends.cuda.device import torch_device

    found = torch_device(device)
    from nomatmul.engine.backends.cuda import opening

    return opening, found


def _load_on_device(
    directory: Path, device: str, verify: bool, cpu_only: dict[str, Any]
) -> LanguageModel:
    opening, found = cuda_part(device, **cpu_only)
    reader = PackedReader(directory)
    capability.check(reader.config, "cuda")
    return LanguageModel(
        opening.open_packed(reader, found, verify),
        reader.config,
        fingerprint=reader.fingerprint,
        packing=reader.packing,
        embedding_form=reader.embedding_form,
        path=directory,
        tokenizer_path=reader.tokenizer_path,
    )


def checked_threads(threads: int | None) -> int | None:
    """Return the number of threads asked for; raises ValueError for one below 1."""
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
    return threads


def _directory(path: str | Path | None) -> Path:
    if path is not None:
        return Path(path)
    if not (BOX / "config.json").exists():
        raise ValueError("this installation carries no model; give the path of a packed model")
    return BOX


def _available_backend() -> str:
    try:
        native()
    except ImportError as error:
        if os.environ.get("NOMATMUL_ISA"):
            raise ValueError(f"NOMATMUL_ISA asks for a native kernel: {error}") from None
        warnings.warn(f"{error}; running the slow numpy reference", RuntimeWarning, stacklevel=3)
        return "numpy"
    return "native"


def _native_backend(
    reader: PackedReader, threads: int | None, isa: str | None, mmap: bool, verify: bool
) -> NativeBackend:
    from nomatmul.engine.weights import map_weights, read_weights

    if isa is not None and isa not in native().kernels.isas():
        available = ", ".join(native().kernels.isas())
        raise ValueError(f"isa {isa!r} is not available here; available: {available}")
    count = threads if threads is not None else default_threads()
    fill = map_weights if mmap else read_weights
    weights = fill(reader, verify=verify, threads=count)
    return NativeBackend(
        reader.config, reader.packing, reader.embedding_form, weights, threads=count, isa=isa
    )
