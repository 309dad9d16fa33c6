"""Tensors of torch's own pickles, `pytorch_model.bin`; torch is imported here only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul._extras import install_line
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.safetensors import check_finite
from nomatmul.formats.files.source import TensorSource


class TorchSource(TensorSource):
    """Tensors of `pytorch_model.bin` files; needs torch, which is imported only here."""

    def __init__(self, paths: list[Path], index: dict[str, str] | None) -> None:
        self._tensors: dict[str, Any] = {}
        self._bytes: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.nested = False
        for path in paths:
            tensors, nested = _load_torch(path)
            self.nested |= nested
            for name, tensor in tensors.items():
                if index is not None and index.get(name) != path.name:
                    raise FormatError(f"{path} holds {name!r}, which the index puts elsewhere")
                if name in self._tensors or name in self.left_out:
                    raise FormatError(f"{path} holds {name!r}, as another part does")
                if tensor.is_floating_point():
                    self._tensors[name] = tensor
                else:
                    self.left_out[name] = str(tensor.dtype)
                    if tensor.element_size() == 1 and str(tensor.dtype) != "torch.bool":
                        self._bytes[name] = tensor
        for name, file in (index or {}).items():
            if name not in self._tensors and name not in self.left_out:
                raise FormatError(f"{file} lacks {name!r}, which the index puts there")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        import torch

        tensor = self._tensors[name]
        if rows is not None:
            tensor = tensor[rows]
        # The copy matters: the tensor may be memory that belongs to the mapped file.
        values: NDArray[np.float32] = tensor.to(torch.float32, copy=True).contiguous().numpy()
        check_finite(values, name)
        return values

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._bytes.items()}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        tensor = self._bytes[name]
        found: NDArray[Any] = (tensor if rows is None else tensor[rows]).clone().numpy()
        return found


def _load_torch(path: Path) -> tuple[dict[str, Any], bool]:
    """(the tensors of a file, whether they lay one level deep in it)."""
    try:
        import torch
    except ImportError:
        raise FormatError(
            f"reading {path} needs torch: {install_line()}, or convert the checkpoint to"
            " safetensors"
        ) from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's older files cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here, from pickle, zip and its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"cannot read {path}: {reason}") from None
    whole, state = state, _open_nesting(state, path)
    if not isinstance(state, dict):
        raise FormatError(f"{path} must hold a dict of tensors, found {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            kind = "a nested dict" if isinstance(tensor, dict) else type(tensor).__name__
            raise FormatError(f"{path} must hold a dict of tensors; {name!r} is {kind}")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values" if tensor.is_meta else f"layout {tensor.layout}"
            raise FormatError(f"{path}: {name} has {kind}, expected a dense tensor")
    # Parameters of a module carry gradients, which numpy refuses.
    return {name: tensor.detach() for name, tensor in state.items()}, state is not whole


def _open_nesting(state: Any, path: Path) -> Any:
    """The dict of tensors in `state`: itself, or the one below "model", "state_dict", ...

    Says so in a warning where it lies deeper.
    """
    if not isinstance(state, dict):
        return state
    for key in ("state_dict", "model_state_dict", "model", "module"):
        inner = state.get(key)
        if isinstance(inner, dict) and inner:
            warnings.warn(f"{path}: read the tensors nested under {key!r}", stacklevel=2)
            return inner
    return state
