"""Weights of a packed model in device memory: two bits a weight, whatever the file has.

Legend: L layers, D hidden size, M inner size, V vocabulary; RB bytes of a packed row, padded to
64 (zero weights), of D columns (RBD) or M columns (RBM).

Equal tensors of all layers lie in one tensor, so a kernel finds a layer by a stride. Tensors are
read, verified and copied one at a time. The 1.6-bit form is unpacked to two bits on the device: a
quarter more memory than on disk, and one set of kernels. Loading is where it is paid, once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nomatmul.engine.backends.cuda.plan import Plan, device_row_bytes
from nomatmul.formats.packing import row_bytes

if TYPE_CHECKING:
    from nomatmul.formats.packed.reader import PackedReader

_ZEROS = 0x55  # four codes 1: zero weights
_TABLES = {"bf16": torch.bfloat16, "int8": torch.int8, "f32": torch.float32}
_BLOCK_ROWS = 4096


def shapes(plan: Plan, embedding_form: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return {stack: (shape, dtype)} of all tensors in device memory."""
    layers, size, inner = plan.layers, plan.size, plan.inner
    short, long = device_row_bytes(size), device_row_bytes(inner)
    u8, f32 = torch.uint8, torch.float32
    table: dict[str, tuple[tuple[int, ...], Any]] = {
        "embedding": ((plan.vocabulary, size), _TABLES[embedding_form]),
        "ifg": ((layers, 3, size, short), u8),
        "o": ((layers, 1, size, short), u8),
        "head": ((1, 1, plan.vocabulary, short), u8),
        "mixer_norm": ((layers, size), f32),
        "ifg_norm": ((layers, 3, size), f32),
        "g_norm": ((layers, size), f32),
        "o_norm": ((layers, 1, size), f32),
        "bound": ((layers, size), f32),
        "final_norm": ((1, size), f32),
        "head_norm": ((1, 1, size), f32),
    }
    if embedding_form == "int8":
        table["embedding_scale"] = ((plan.vocabulary,), f32)
    if plan.trees is not None:
        rows = plan.trees.rows
        table["rows"] = ((layers, rows, 2, short), u8)
        table["channel_norm"] = ((layers, size), f32)
        table["norm_in"] = ((layers, size), f32)
        table["norm_out"] = ((layers, rows), f32)
    if plan.glu is not None:
        table["gate"] = ((layers, 1, 2 * inner, short), u8)
        table["down"] = ((layers, 1, size, long), u8)
        table["channel_norm"] = ((layers, size), f32)
        table["gate_norm"] = ((layers, 1, size), f32)
        table["down_norm"] = ((layers, 1, inner), f32)
    return table


def bytes_needed(plan: Plan, embedding_form: str) -> dict[str, int]:
    """Return bytes of each stack."""
    return {
        name: math.prod(shape) * dtype.itemsize
        for name, (shape, dtype) in shapes(plan, embedding_form).items()
    }


class DeviceWeights:
    """Stacks of `shapes` as attributes of `stack`, and `w_scale`: {linear: its scale}."""

    def __init__(self, plan: Plan, embedding_form: str, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.stack: dict[str, Tensor] = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes(plan, embedding_form).items()
        }
        self.w_scale: dict[str, float] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.stack.values())

    def footprint(self) -> dict[str, int]:
        """Bytes by part: embedding, core, head, norms."""
        parts = dict.fromkeys(("embedding", "core", "head", "norms"), 0)
        for name, tensor in self.stack.items():
            part = "norms" if tensor.dtype == torch.float32 else "core"
            if name.startswith("embedding"):
                part = "embedding"
            parts["head" if name == "head" else part] += tensor.nbytes
        return parts

    def unvisited_bytes(self) -> int:
        """Bytes of the rows of trees that one token does not visit."""
        trees = self.plan.trees
        if trees is None:
            return 0
        return self.stack["rows"].nbytes // trees.rows * (trees.rows - trees.active_rows)

    def slot(self, name: str) -> Tensor:
        """The place of a tensor of the packed file (a scale has none: it goes to `w_scale`)."""
        if name.startswith("embedding."):
            return self.stack["embedding" if name.endswith(".weight") else "embedding_scale"]
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else 0
        rest = ".".join(parts[2:] if parts[0] == "layers" else parts)
        rest = rest.replace("mixer.", "").replace("channel.", "").replace("_proj", "")
        linear, _, what = rest.partition(".")
        if linear in ("rows", "norm_in", "norm_out"):
            return self.stack[linear][layer]
        if what in ("packed", "norm.weight"):
            stack = linear if what == "packed" else f"{linear}_norm"
            if linear in ("i", "f", "g"):
                return self.stack[stack.replace(linear, "ifg", 1)][layer, "ifg".index(linear)]
            return self.stack[stack][layer, 0]
        return self.stack["bound" if rest == "lower_bound" else linear][layer]

    def put(self, name: str, array: np.ndarray, matrix: tuple[int, str] | None) -> None:
        """Copy a tensor as the file holds it (bfloat16 as uint16 bits) to its place.

        matrix: (columns, packing) of packed rows, None for all else.
        """
        if name.endswith(".scale") and not name.startswith("embedding."):
            ends = ("",) if len(array) == 1 else (".in", ".out")  # an FFF has two scales
            for end, value in zip(ends, array, strict=True):
                self.w_scale[name.removesuffix(".scale") + end] = float(value)
            return
        place = self.slot(name)
        if matrix is None:
            host = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
            place.copy_(host.view(place.dtype).reshape(place.shape))
            return
        columns, packing = matrix
        for start in range(0, len(array), _BLOCK_ROWS):
            rows = torch.from_numpy(array[start : start + _BLOCK_ROWS]).to(self.device)
            if packing == "1.6bit":
                rows = two_bits(rows, columns)
            part = place[start : start + len(rows)]
            part[..., : rows.shape[-1]] = rows
            part[..., rows.shape[-1] :] = _ZEROS


def two_bits(rows: Tensor, columns: int) -> Tensor:
    """Rows of the 1.6-bit form, uint8 [N, bytes], in the 2-bit form [N, row_bytes]."""
    rest = rows.to(torch.int16)
    digits = []
    for _ in range(5):
        rest = rest * 3
        digits.append(rest >> 8)
        rest = rest & 255
    codes = torch.stack(digits, dim=-1).to(torch.uint8).flatten(1)[:, :columns]
    padded = codes.new_ones((len(rows), 4 * row_bytes(columns, "2bit")))
    padded[:, :columns] = codes
    four = padded.view(len(rows), -1, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def read_weights(reader: PackedReader, device: torch.device, verify: bool = True) -> DeviceWeights:
    """Copy a packed directory to the device, one tensor at a time.

    Raises FormatError for bytes that do not match their checksum, illegal codes, or values that
    are not finite.
    """
    from nomatmul.engine.weights import DTYPES

    weights = DeviceWeights(Plan.of(reader.config), reader.embedding_form, device)
    check = _verifier()
    for name, info in reader.infos.items():
        array = np.empty(info.shape, DTYPES[info.dtype])
        reader.read_into(name, array.reshape(-1))
        if verify:
            check(reader, name, array)
        weights.put(name, array, reader.matrices.get(name))
    return weights


def _verifier() -> Any:
    """The native check of codes, or numpy's where the native core is missing."""
    from nomatmul.engine.native import native
    from nomatmul.engine.weights import verify_tensor

    try:
        native()
    except ImportError:
        return lambda reader, name, array: reader.verify(name, array.reshape(-1))
    return verify_tensor


def random_weights(
    plan: Plan, embedding_form: str, seed: int, device: torch.device
) -> DeviceWeights:
    """Random legal codes made on the device; scales keep the activations near 1."""
    weights = DeviceWeights(plan, embedding_form, device)
    random = torch.Generator(device=device).manual_seed(seed)
    for name, tensor in weights.stack.items():
        if tensor.dtype == torch.uint8:
            columns = plan.inner if name == "down" else plan.size
            stacks = tensor if name == "rows" else tensor.flatten(0, 1)
            for matrix in stacks:
                _random_codes(matrix.view(-1, matrix.shape[-1]), columns, random)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128, generator=random)
        elif name == "embedding_scale":
            tensor.fill_(1 / 64)
        elif name == "embedding":
            tensor.normal_(generator=random)
        elif name == "bound":
            steps = torch.arange(plan.layers, device=device) / plan.layers
            tensor.copy_((steps if plan.bounded else steps * 0)[:, None])
        else:
            tensor.normal_(1.0, 0.1, generator=random)
    for name, linear in plan.model.linears().items():
        weights.w_scale[name] = _even(linear.inputs)
    for name, trees in plan.model.trees().items():
        weights.w_scale[f"{name}.rows.in"] = _even(trees.size)
        weights.w_scale[f"{name}.rows.out"] = _even(trees.active_rows)
    return weights


def _even(terms: int) -> float:
    """The scale that keeps a sum of so many random ternary terms near 1."""
    return float(np.float32(1 / math.sqrt(terms * 2 / 3)))


def _random_codes(matrix: Tensor, columns: int, random: torch.Generator) -> None:
    matrix.random_(0, 256, generator=random)
    matrix &= ~((matrix & (matrix >> 1) & _ZEROS) << 1)  # code 3 becomes 1
    whole = columns // 4
    matrix[:, whole:] = torch.where(
        torch.arange(matrix.shape[1] - whole, device=matrix.device) == 0,
        _partial(matrix[:, whole:], columns % 4),
        torch.tensor(_ZEROS, dtype=torch.uint8, device=matrix.device),
    )


def _partial(tail: Tensor, live: int) -> Tensor:
    """Bytes of which only the first `live` codes count."""
    keep = (1 << (2 * live)) - 1
    return (tail & keep) | (_ZEROS & ~keep & 255)
