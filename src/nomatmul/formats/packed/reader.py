"""Reading a packed model directory; nothing that fails a check gets past this file.

A reader answers with tensors equal to those that were written, or raises FormatError.
Legend: N/K rows and columns of a linear, R rows of a layer's trees, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.files.safetensors import NUMPY_DTYPES, Buffer, SafetensorsFile, check_finite
from nomatmul.formats.packed import layout
from nomatmul.formats.packed.description import FORMAT, parse
from nomatmul.formats.packing import check_codes, unpack_ternary
from nomatmul.formats.quantise import dequantised, from_bfloat16
from nomatmul.formats.runs import refuse_unpacked

_METADATA_KEYS = {"format", "config_sha256", "crc32"}

_PIECE = 1 << 22  # bytes of a large tensor that are verified at once

Floats = NDArray[np.float32]
Values = NDArray[np.int8] | Floats


class PackedReader:
    """The weights of a packed model directory, whose small parts (config, header, tokenizer) are
    verified.

    config: ModelConfig. forms: Forms. reading: what an encoder is for, None of a decoder. layout:
    Layout. infos: {name: TensorInfo(dtype, shape, byte offset in `weights_path`, nbytes)}.
    matrices: {name of a packed tensor: (true length of its rows, form of its codes)}.

    `matrix`, `rows` and `read_float32` answer with values, whatever the forms; `read` with a tensor
    as stored. Data is checked when it is read, or by `verify` on bytes that the caller has read
    itself. Raises FormatError (a ValueError) for anything missing, damaged, foreign or unknown.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        refuse_unpacked(self.directory)
        if not self.directory.is_dir():
            what = "is not a directory" if self.directory.exists() else "does not exist"
            raise FormatError(f"{directory} {what}; a packed model is a directory")
        config_path = self.directory / layout.CONFIG_FILE
        config_bytes = _read_file(config_path)
        values = read_json_object(config_path, config_bytes)
        try:
            self.config, self.forms, self.reading = parse(values)
        except (ValueError, TypeError) as error:
            raise FormatError(f"{config_path}: {error}") from None
        self.weights_path = self.directory / layout.WEIGHTS_FILE
        self._file = SafetensorsFile(self.weights_path)
        self.infos = self._file.infos
        self._check_metadata(config_bytes)
        self.layout = layout.layout_of(self.config, self.forms, self.reading)
        self._check_shapes()
        self.matrices, self._scales = self.layout.codes(), self.layout.scales()
        self._at = {m.name: m for m in self.layout.matrices}

    @property
    def packing(self) -> str:
        """Form of the ternary linears: "2bit", "1.6bit", or "none" in a model without them."""
        return self.forms.ternary

    @property
    def embedding_form(self) -> str:
        """Form of the embedding (`Forms.embedding`)."""
        return self.forms.embedding

    @property
    def tokenizer_path(self) -> Path | None:
        """The verified tokenizer.json, or None when the model has none."""
        path = self.directory / layout.TOKENIZER_FILE
        return path if path.exists() else None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the checksums of config and weights: names this very model."""
        text = self._file.metadata["config_sha256"] + self._file.metadata["crc32"]
        return hashlib.sha256(text.encode()).hexdigest()

    def read_into(self, name: str, buffer: Buffer) -> None:
        """Fill a writable buffer of exactly `infos[name].nbytes` bytes; not verified yet."""
        self._file.read_into(name, buffer)

    def verify_floats(self, name: str, buffer: Buffer, passed: Callable[[int, int], None]) -> None:
        """As `verify`, of a float tensor piece by piece: `passed` is told the bytes of each when it
        has been looked at."""
        view, crc = memoryview(buffer).cast("B"), 0
        info, where = self._file.info(name), f"{self.weights_path}: {name}"
        assert view.nbytes == info.nbytes
        for first in range(0, view.nbytes, _PIECE):
            piece = view[first : first + _PIECE]
            crc = zlib.crc32(piece, crc)
            _check_floats(np.frombuffer(piece, NUMPY_DTYPES[info.dtype]), info.dtype, where)
            passed(first, first + piece.nbytes)
        if crc != self._crc[name]:
            raise FormatError(f"{where} does not match its checksum")

    def verify(self, name: str, buffer: Buffer, codes: bool = True) -> None:
        """Check the bytes of a tensor: checksum, codes, finite floats, positive scales.

        `codes=False` leaves the codes of packed weights to the caller.
        Raises FormatError naming the tensor.
        """
        info = self._file.info(name)
        view = memoryview(buffer).cast("B")
        if view.nbytes != info.nbytes:
            raise ValueError(f"{name} has {info.nbytes} bytes, the buffer {view.nbytes}")
        if zlib.crc32(view) != self._crc[name]:
            raise FormatError(f"{self.weights_path}: {name} does not match its checksum")
        array = np.frombuffer(view, NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        where = f"{self.weights_path}: {name}"
        if info.dtype == "U8" and codes:
            try:
                check_codes(array.reshape(-1, info.shape[-1]), *self.matrices[name])
            except ValueError as error:
                raise FormatError(f"{where}: {error}") from None
        elif info.dtype in ("BF16", "F32", "F16"):
            _check_floats(array.reshape(-1), info.dtype, where)
            if name in self._scales and not np.all(array > 0):
                raise FormatError(f"{where} must be above 0, found {array.min()}")

    def read(self, name: str) -> NDArray[Any]:
        """Return a verified tensor in its stored dtype (bfloat16 as uint16 bits)."""
        info = self._file.info(name)
        array = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        flat = array.reshape(-1)
        self.read_into(name, flat)
        self.verify(name, flat)
        return array

    def read_float32(self, name: str) -> Floats:
        """Return a verified tensor as float32: bfloat16 and int8 expanded to their values.

        Raises FormatError for packed rows: those are read by `matrix` and `rows`.
        """
        if name in self.matrices:
            raise FormatError(f"{name} is packed; read it with PackedReader.ternary")
        if name not in self._at:
            floats: Floats = self.read(name)
            return floats
        return self.floats(self._at[name])

    def floats(self, matrix: layout.Matrix) -> Floats:
        """Return a matrix of the layout, of all of its sources, expanded to its values."""
        return dequantised(*self._values(matrix))

    def embedding(self) -> Floats:
        """Return the table [V, D], expanded to its values, whatever its form."""
        return self.floats(self.layout.matrices[-1])

    def matrix(self, linear: str) -> tuple[Values, Floats | None]:
        """Return (values [N, K], scales) of a linear such as "layers.0.mixer.q_proj".

        Values are int8 of ternary (scales float32 [blocks of rows] or [N, groups]) and int8 ones
        (scales [N] or [N, groups]), else float32 (None). "embedding" is the table.
        Raises FormatError for a linear that has no weight of its own.
        """
        source = f"{linear}.weight"
        found = next((m for m in self.layout.matrices if source in m.sources), None)
        if found is None:
            raise FormatError(f"{self.weights_path} holds no linear {linear!r}")
        values, scale = self._values(found)
        if len(found.sources) == 1:
            return values, scale
        own = found.part(source)
        return values[own], None if scale is None else scale[own]

    def rows(self, trees: str) -> tuple[Values, Floats | None]:
        """Return (values [R, 2, D], scales) of the rows of trees such as "layers.0.channel".

        Row r holds a node's input and output weights: int8 of ternary (scales float32 [2]) and int8
        ones (scales [R, 2]), else float32 (None).
        """
        source = f"{trees}.w_in"
        return self._values(next(m for m in self.layout.matrices if source in m.sources))

    def ternary(self, linear: str) -> tuple[NDArray[np.int8], Floats]:
        """Return (int8 [N, K] of -1, 0, 1, scales float32 [blocks of rows] or [N, groups]) of a
        ternary linear such as "head"; the scales of all rows are the same, or split evenly over
        the blocks."""
        values, scale = self.matrix(linear)
        assert scale is not None
        return values.astype(np.int8, copy=False), scale

    def verify_all(self) -> None:
        """Read and verify every tensor; raises FormatError at the first that fails."""
        for name in self.infos:
            self.read(name)

    def _values(self, matrix: layout.Matrix) -> tuple[Values, Floats | None]:
        stored = self.read(matrix.name)
        scale: Floats | None = None
        if matrix.scale is not None:
            scale = self.read(matrix.scale).astype(np.float32, copy=False)
        if matrix.packed:
            flat = unpack_ternary(
                stored.reshape(-1, stored.shape[-1]), matrix.shape[-1], matrix.form
            )
            return flat.reshape(matrix.shape), scale
        if matrix.form == "f16":
            return stored.astype(np.float32), scale
        return from_bfloat16(stored) if matrix.form == "bf16" else stored, scale

    def _check_metadata(self, config_bytes: bytes) -> None:
        metadata = self._file.metadata
        tokenizer = self.directory / layout.TOKENIZER_FILE
        expected = _METADATA_KEYS | ({"tokenizer_sha256"} if tokenizer.exists() else set())
        expected |= {"beside_sha256"} & set(metadata)
        if metadata.get("format") != FORMAT:
            raise FormatError(f"{self.weights_path} is not the weights of a packed model")
        if set(metadata) != expected:
            key = min(set(metadata) ^ expected)
            word = "missing" if key in expected else "unexpected"
            hint = f"; is {tokenizer.name} lost or added?" if key == "tokenizer_sha256" else ""
            raise FormatError(f"{self.weights_path}: {word} metadata {key!r}{hint}")
        _check_sha256(metadata["config_sha256"], config_bytes, self.directory / layout.CONFIG_FILE)
        if tokenizer.exists():
            _check_sha256(metadata["tokenizer_sha256"], _read_file(tokenizer), tokenizer)
        digests = metadata.get("beside_sha256", "{}").encode()
        where = f"the checksums in {self.weights_path}"
        for name, digest in read_json_object(where, digests).items():
            if name not in layout.BESIDE_FILES:
                raise FormatError(f"{where} name the unknown file {name!r}")
            path = self.directory / name
            _check_sha256(digest, _read_file(path), path)
        table = read_json_object(
            f"the checksums of {self.weights_path}", metadata["crc32"].encode()
        )
        if set(table) != set(self.infos):
            raise FormatError(f"{self.weights_path}: checksums and tensors do not pair up")
        self._crc: dict[str, int] = {}
        for name, text in table.items():
            if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{8}", text):
                raise FormatError(
                    f"{self.weights_path}: the checksum of {name!r} is malformed:"
                    f" {json.dumps(text)}"
                )
            self._crc[name] = int(text, 16)

    def _check_shapes(self) -> None:
        expected = self.layout.tensors()
        for name, (dtype, shape) in expected.items():
            info = self._file.info(name)
            if (info.dtype, info.shape) != (dtype, shape):
                raise FormatError(
                    f"{self.weights_path}: {name} is {info.dtype} {list(info.shape)}, the config"
                    f" asks for {dtype} {list(shape)}"
                )
        extra = set(self.infos) - set(expected)
        if extra:
            raise FormatError(f"{self.weights_path} holds the unknown tensor {min(extra)!r}")


def _check_floats(values: NDArray[Any], dtype: str, where: str) -> None:
    if dtype != "BF16":
        check_finite(values, where)
    elif not _finite_bfloat16(values):
        raise FormatError(f"{where} holds a value that is not finite (NaN or infinity)")


def _finite_bfloat16(bits: NDArray[np.uint16]) -> bool:
    # By blocks: a whole embedding's temporaries would double the peak memory of loading.
    blocks = (bits[at : at + (1 << 20)] for at in range(0, bits.size, 1 << 20))
    return not any(np.any((block & 0x7F80) == 0x7F80) for block in blocks)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None


def _check_sha256(expected: str, data: bytes, path: Path) -> None:
    if hashlib.sha256(data).hexdigest() != expected:
        raise FormatError(f"{path} does not match the checksum in {layout.WEIGHTS_FILE}")
