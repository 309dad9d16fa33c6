"""Two ways to store ternary rows: two bits a weight, or five weights a byte (1.6 bits).

Legend: N rows, K columns (true length of a row), t ternary int8 in {-1, 0, 1}, code = t + 1.

"2bit": element k lies in bits 2*(k%4) of byte k//4; rows are padded to a multiple of 128
elements (32 bytes) with code 1, which is zero. Code 3 is illegal.
"1.6bit": element k is digit k%5 of byte k//5; v = sum over p of digit_p * 3^(4-p) and
byte = ceil(v * 256 / 243), so that three multiplications by 3 with carries read the digits back
without division. Rows are padded to a multiple of 160 elements (32 bytes) with digit 1.
13 of the 256 bytes stand for no v; they are illegal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PACKINGS = ("2bit", "1.6bit")
PER_BYTE = {"2bit": 4, "1.6bit": 5}
ROW_ALIGN_BYTES = 32

_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)
# Bytes of one slice of work: keeps temporaries in cache instead of doubling a large tensor.
_BLOCK_BYTES = 1 << 20


def row_bytes(columns: int, form: str) -> int:
    """Return the bytes of one packed row of `columns` elements, padding included.

    Raises ValueError for an unknown form or a negative length.
    """
    per_byte = _per_byte(form)
    if columns < 0:
        raise ValueError(f"a row cannot have {columns} elements")
    per_row = per_byte * ROW_ALIGN_BYTES
    return -(-columns // per_row) * ROW_ALIGN_BYTES


def pack_ternary(t_NK: NDArray[np.int8], form: str) -> NDArray[np.uint8]:
    """Pack ternary int8 [N, K] into uint8 [N, row_bytes(K, form)].

    Raises ValueError when the input is no matrix or holds a value outside -1, 0, 1.
    """
    t_NK = np.asarray(t_NK)
    if t_NK.ndim != 2:
        raise ValueError(f"ternary weights must be a matrix, got shape {t_NK.shape}")
    if t_NK.size and (t_NK.min() < -1 or t_NK.max() > 1):
        raise ValueError(f"ternary weights must lie in -1..1, found {t_NK.min()}..{t_NK.max()}")
    rows, columns = t_NK.shape
    width = row_bytes(columns, form)
    packed = np.empty((rows, width), dtype=np.uint8)
    for part in _row_blocks(rows, width):
        codes = np.ones((part.stop - part.start, width * PER_BYTE[form]), dtype=np.uint8)
        codes[:, :columns] = (t_NK[part] + 1).astype(np.uint8)
        packed[part] = _encode(codes, form)
    return packed


def unpack_ternary(packed: NDArray[np.uint8], columns: int, form: str) -> NDArray[np.int8]:
    """Unpack uint8 [N, row_bytes(K, form)] into ternary int8 [N, K], K = `columns`.

    Raises ValueError for a wrong row length, an illegal code or byte, or wrong padding.
    """
    check_codes(packed, columns, form)
    rows, width = packed.shape
    t_NK = np.empty((rows, columns), dtype=np.int8)
    for part in _row_blocks(rows, width):
        t_NK[part] = _decode(packed[part], form)[:, :columns].astype(np.int8) - 1
    return t_NK


def check_codes(packed: NDArray[np.uint8], columns: int, form: str) -> None:
    """Refuse packed rows that no `pack_ternary` can have written.

    Raises ValueError for a wrong dtype or row length, a code 3 or an illegal byte, or padding
    that is not zero weights.
    """
    width = row_bytes(columns, form)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        raise ValueError(
            f"packed rows of {columns} elements ({form}) must be uint8 [N, {width}],"
            f" got {packed.dtype} {list(packed.shape)}"
        )
    rows = packed.shape[0]
    for part in _row_blocks(rows, width):
        _check_legal(packed[part], form)
    first = columns // PER_BYTE[form]
    if first < width and rows:
        tail = _decode(packed[:, first:], form)[:, columns - first * PER_BYTE[form] :]
        if np.any(tail != 1):
            raise ValueError(f"the padding behind {columns} packed elements is not zero weights")


def _check_legal(block: NDArray[np.uint8], form: str) -> None:
    if form == "2bit":
        if np.any(block & (block >> 1) & 0x55):
            raise ValueError("packed weights hold the illegal code 3")
    elif not np.all(_LEGAL_BASE3[block]):
        bad = int(block[~_LEGAL_BASE3[block]][0])
        raise ValueError(f"packed weights hold the illegal byte {bad}")


def _encode(codes: NDArray[np.uint8], form: str) -> NDArray[np.uint8]:
    groups = codes.reshape(codes.shape[0], -1, PER_BYTE[form])
    if form == "2bit":
        byte: NDArray[np.uint8] = np.bitwise_or(groups[..., 0], groups[..., 1] << 2)
        byte |= groups[..., 2] << 4
        byte |= groups[..., 3] << 6
        return byte
    values = np.sum(groups * _POWERS, axis=-1, dtype=np.uint16)
    return np.take(_BASE3_BYTE, values)


def _decode(packed: NDArray[np.uint8], form: str) -> NDArray[np.uint8]:
    rows, width = packed.shape
    if form == "2bit":
        shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
        codes: NDArray[np.uint8] = np.bitwise_and(packed[..., None] >> shifts, np.uint8(3))
        return codes.reshape(rows, width * 4)
    return _BASE3_DIGITS[packed].reshape(rows, width * 5)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _per_byte(form: str) -> int:
    if form not in PER_BYTE:
        raise ValueError(f"packing {form!r} is unknown; legal values are '2bit', '1.6bit'")
    return PER_BYTE[form]


def _base3_digits() -> NDArray[np.uint8]:
    digits = np.empty((256, 5), dtype=np.uint8)
    rest = np.arange(256, dtype=np.uint16)
    for place in range(5):
        rest *= np.uint16(3)
        digits[:, place] = rest >> 8
        rest &= np.uint16(255)
    return digits


_BASE3_BYTE = ((np.arange(243, dtype=np.uint32) * 256 + 242) // 243).astype(np.uint8)
_BASE3_DIGITS = _base3_digits()
_LEGAL_BASE3 = np.zeros(256, dtype=bool)
_LEGAL_BASE3[_BASE3_BYTE] = True
