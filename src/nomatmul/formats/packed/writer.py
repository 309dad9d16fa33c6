"""Writing a packed model directory: in one pass, checked, and either whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.chat_template import TEMPLATE_FILE, find_template
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.errors import FormatError, WriteError
from nomatmul.formats.files.atomic import sync_directory
from nomatmul.formats.files.safetensors import (
    NUMPY_DTYPES,
    bytes_of,
    check_finite,
    header_bytes,
)
from nomatmul.formats.generation_config import GENERATION_FILE, sampling_defaults
from nomatmul.formats.packed.card import card_text
from nomatmul.formats.packed.description import FORMAT, describe
from nomatmul.formats.packed.layout import (
    BESIDE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    TREE_PACKING,
    WEIGHTS_FILE,
    Forms,
    layout_of,
)
from nomatmul.formats.packing import check_codes, pack_ternary
from nomatmul.formats.tokenizer import tokenizer_from_bytes
from nomatmul.formats.tokenizer_config import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from nomatmul.formats.tokenizer_config import tokenizer_config_bytes

# Tensor data starts on a page, so that a mapped file has its first tensor on one.
_DATA_ALIGN = 4096


class PackedWriter:
    """Writes a packed model directory tensor by tensor, in the order of `names`.

    Use it as a context manager. Everything goes to a hidden temporary directory beside `dst`,
    which is synced and renamed to `dst` by `close`; on any exception it is removed and nothing
    lies under `dst`. Raises ValueError for a destination that exists (an empty directory may),
    a model that cannot be packed, or a tensor that does not fit; WriteError (also an OSError)
    when the disk is full or not writable.
    """

    def __init__(
        self,
        dst: str | Path,
        config: ModelConfig,
        forms: Forms,
        reading: EncoderReading | None = None,
        tokenizer_path: str | Path | None = None,
    ) -> None:
        self._temporary: Path | None = None
        self._file: IO[bytes] = io.BytesIO()  # until `_begin` opens the weights
        self.dst = Path(dst)
        self.layout = layout_of(config, forms, reading)
        self._tensors = self.layout.tensors()
        self._codes, self._scales = self.layout.codes(), self.layout.scales()
        self.names = list(self._tensors)
        self._pending = list(reversed(self.names))
        self._crc = dict.fromkeys(self.names, 0)
        refuse_existing(self.dst)
        document = json.dumps(describe(config, forms, reading), indent=2) + "\n"
        files = {
            CONFIG_FILE: document.encode(),
            CARD_FILE: card_text(config, forms, reading).encode(),
        }
        self._metadata = {
            "format": FORMAT,
            "config_sha256": hashlib.sha256(files[CONFIG_FILE]).hexdigest(),
        }
        if tokenizer_path is not None:
            files |= tokenizer_bundle(Path(tokenizer_path), config)
            digest = hashlib.sha256(files[TOKENIZER_FILE]).hexdigest()
            self._metadata["tokenizer_sha256"] = digest
            beside = {name: files[name] for name in BESIDE_FILES if name in files}
            if beside:
                digests = {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}
                self._metadata["beside_sha256"] = json.dumps(digests)
        with self._guard():
            self._begin(files)

    def add(self, name: str, data: NDArray[Any] | Iterable[NDArray[Any]]) -> None:
        """Write the next tensor: an array of its dtype and shape, or blocks of its rows.

        bfloat16 is given as uint16 bits, float16 as numpy's. Raises ValueError for a tensor out of
        order, of a wrong dtype or shape, with values that are not finite, or with illegal codes.
        """
        with self._guard():
            if not self._pending or self._pending[-1] != name:
                due = self._pending[-1] if self._pending else "nothing"
                raise ValueError(f"tensor {name!r} is out of order; {due!r} is due")
            dtype, shape = self._tensors[name]
            rows = 0
            for block in [data] if isinstance(data, np.ndarray) else data:
                self._check_block(name, block, dtype, shape)
                rows += block.shape[0]
                view = bytes_of(np.ascontiguousarray(block))
                self._file.write(view)
                self._crc[name] = zlib.crc32(view, self._crc[name])
            if rows != shape[0]:
                raise ValueError(f"{name} needs {shape[0]} rows, got {rows}")
            self._pending.pop()

    def add_packed(self, name: str, blocks: NDArray[np.int8] | Iterable[NDArray[np.int8]]) -> None:
        """Pack and write a ternary matrix, given whole or in blocks of rows.

        Rows are int8 [n, K]; those of trees [n, 2, K], input beside output weights.
        """
        parts = [blocks] if isinstance(blocks, np.ndarray) else blocks
        _, form = self._codes.get(name, (0, TREE_PACKING))  # `add` refuses a foreign name
        self.add(name, (_packed(part, form) for part in parts))

    def close(self) -> None:
        """Finish the directory and give it its name; raises ValueError if a tensor is missing."""
        if self._temporary is None:
            return
        with self._guard():
            if self._pending:
                raise ValueError(f"the packed model lacks the tensor {self._pending[-1]!r}")
            self._file.seek(0)
            self._file.write(self._header())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sync_directory(self._temporary)
            refuse_existing(self.dst)
            os.replace(self._temporary, self.dst)
            self._temporary = None
            sync_directory(self.dst.parent)

    def abort(self) -> None:
        """Remove everything written so far; does nothing after `close`."""
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        self.abort()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Clean up on any exception, and say in one line what the disk refused."""
        try:
            yield
        except OSError as error:
            self.abort()
            reason = error.strerror or str(error)
            raise WriteError(f"cannot write the packed model {self.dst}: {reason}") from error
        except BaseException:
            self.abort()
            raise

    def _begin(self, files: dict[str, bytes]) -> None:
        parent = self.dst.parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = parent / f".{self.dst.name}.part-{secrets.token_hex(4)}"
        temporary.mkdir()
        self._temporary = temporary
        for name, data in files.items():
            with open(self._temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._file = open(self._temporary / WEIGHTS_FILE, "wb")  # noqa: SIM115  # till close()
        self._file.write(self._header())

    def _header(self) -> bytes:
        """The safetensors header; its length does not depend on the checksums in it."""
        checksums = {name: f"{crc:08x}" for name, crc in self._crc.items()}
        crc32 = json.dumps(checksums, separators=(",", ":"))
        return header_bytes(self._tensors, {**self._metadata, "crc32": crc32}, _DATA_ALIGN)

    def _check_block(
        self, name: str, block: NDArray[Any], dtype: str, shape: tuple[int, ...]
    ) -> None:
        if block.dtype != NUMPY_DTYPES[dtype] or block.shape[1:] != shape[1:] or not block.ndim:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, got {block.dtype} {list(block.shape)}"
            )
        if dtype == "U8":
            check_codes(block.reshape(-1, shape[-1]), *self._codes[name])
        elif dtype == "BF16" and np.any((block & 0x7F80) == 0x7F80):
            raise FormatError(f"{name} holds a value that is not finite (NaN or infinity)")
        elif dtype in ("F32", "F16"):
            check_finite(block, name)
            if name in self._scales and not np.all(block > 0):
                raise FormatError(f"{name} must be above 0, found {block.min()}")


def refuse_existing(dst: Path) -> None:
    """Raise FormatError for a place where no model can be put; an empty directory is one."""
    if dst.is_symlink() or (dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))):
        raise FormatError(f"{dst} already exists; give a new name or remove it first")


def tokenizer_bundle(path: Path, config: ModelConfig) -> dict[str, bytes]:
    """tokenizer.json as it is, tokenizer_config.json for other programs, and what lies beside:
    the chat template in a file of its own, generation_config.json as it is."""
    try:
        data = path.read_bytes()
        generation = path.parent / GENERATION_FILE
        beside = {GENERATION_FILE: generation.read_bytes()} if generation.is_file() else {}
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    sampling_defaults(path.parent)  # refuses a file that no one could use
    if (template := find_template(path.parent)) is not None:
        beside[TEMPLATE_FILE] = template.encode("utf-8")
    names = tokenizer_config_bytes(tokenizer_from_bytes(data, path), config, path.parent)
    return {TOKENIZER_FILE: data, TOKENIZER_CONFIG_FILE: names, **beside}


def _packed(t: NDArray[np.int8], form: str) -> NDArray[np.uint8]:
    rows = pack_ternary(t.reshape(-1, t.shape[-1]) if t.ndim == 3 else t, form)
    return rows.reshape(*t.shape[:-1], rows.shape[-1]) if t.ndim == 3 else rows
