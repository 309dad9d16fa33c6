"""BitLinear as transformers and onebitllms store it: `quantization_config` and what lies beside it.

Facts follow transformers' integrations/bitnet.py and onebitllms. A packed weight is uint8
[N / 4, K]: bits 2i of row r are row r + i * N / 4, as t + 1. `autobitlinear` multiplies by
`weight_scale`, the older BitLinear divides by it. "online" models hold master weights: mean|W| is
taken in float32 whatever they are stored in, and since this package computes in float32, t * scale
is not rounded to a shorter type afterwards. Legend: N outputs, K inputs, t in -1, 0, 1.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.source import TensorSource
from nomatmul.formats.files.wrappers import missing_tensor
from nomatmul.formats.quantise import absmean_scale, ternarise

_KEYS = (
    *("quant_method", "linear_class", "quantization_mode"),
    *("modules_to_not_convert", "use_rms_norm", "rms_norm_eps", "bits"),
)
FIRST_KEYS = {"weight_bits": 1, "input_bits": 8}
_LINEAR_CLASSES = ("bitlinear", "autobitlinear")
_MODES = ("offline", "online")
_PER_BYTE = 4
_UNSIGNED = ("U8", "torch.uint8")
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class BitLinears:
    """How the BitLinears of a model are stored and computed.

    divide: is `weight_scale` 1 / scale? online: are the weights masters, without a scale?
    norm_eps: of the norm inside each, None without. rounding: ties of the activations.
    """

    divide: bool
    online: bool
    norm_eps: float | None
    rounding: str

    @property
    def words(self) -> str:
        if self.online:
            return "master weights, ternarised by their mean magnitude"
        return "ternary weights beside weight_scale"


def bit_linears(values: JsonObject, linears: list[str]) -> BitLinears | None:
    """What a config.json says of its BitLinears; None without a quantization_config.

    linears: published names of the modules that have to be BitLinears. Raises FormatError, by name,
    for another method, an option that is not understood, and modules that are left out.
    """
    given = values.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("quant_method") != "bitnet":
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise FormatError(f"quant_method {method!r} is not supported; it must be 'bitnet'")
    if given.get("bits", 2) != 2:  # some packers say so; transformers does not look
        raise FormatError(f"bits {given['bits']!r} is not supported; it must be 2")
    unknown = sorted(str(k) for k, v in given.items() if k not in _KEYS and v not in (None, False))
    if unknown:
        raise FormatError(f"quantization_config has the unknown key {unknown[0]!r}")
    kind = _choice(given, "linear_class", _LINEAR_CLASSES)
    mode = _choice(given, "quantization_mode", _MODES)
    left_out = given.get("modules_to_not_convert")
    _check_modules(left_out, linears)
    exported = values.get("is_bitnet_config") is True and isinstance(left_out, list)
    return BitLinears(
        divide=kind == "bitlinear",
        online=kind == "autobitlinear" and mode == "online",
        norm_eps=_norm_eps(given),
        # onebitllms' export is the one that lists the modules; it trained with floor(x + 0.5)
        rounding="up" if kind == "bitlinear" and exported else "even",
    )


def first_bit_linears(values: JsonObject) -> BitLinears | None:
    """What `weight_bits` and `input_bits` say, by which the first BitNet b1.58 (1bitLLM) is told:
    masters, fed with int8. None without them. Raises FormatError for other numbers of bits."""
    given = {key: values[key] for key in FIRST_KEYS if values.get(key) is not None}
    if not given:
        return None
    if given != FIRST_KEYS:
        words = ", ".join(f"{key} {value!r}" for key, value in given.items())
        raise FormatError(f"{words} is not supported; only weight_bits 1 with input_bits 8 is")
    return BitLinears(divide=False, online=True, norm_eps=None, rounding="even")


def _choice(given: JsonObject, key: str, legal: tuple[str, ...]) -> str:
    value = given.get(key, legal[0])
    if value not in legal:
        choices = " or ".join(map(repr, legal))
        raise FormatError(f"{key} {value!r} is not supported; it must be {choices}")
    return str(value)


def _norm_eps(given: JsonObject) -> float | None:
    used, eps = given.get("use_rms_norm", False), given.get("rms_norm_eps", 1e-6)
    if not isinstance(used, bool):
        raise FormatError(f"use_rms_norm must be true or false, got {used!r}")
    if used and (isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1):
        raise FormatError(f"rms_norm_eps {eps!r} must be a number above 0 and below 1")
    return float(eps) if used else None


def _check_modules(left_out: object, linears: list[str]) -> None:
    """All linears of the blocks are BitLinears, the head is none; else the model is another one."""
    if left_out is None:
        return  # transformers leaves out the head then
    if not isinstance(left_out, list) or not all(isinstance(key, str) for key in left_out):
        raise FormatError(f"modules_to_not_convert must be a list of names, got {left_out!r}")
    for key in left_out:
        if len(key) > 200 or key.count("*") > 3 or not re.fullmatch(r"[\w.*-]+", key):
            raise FormatError(f"modules_to_not_convert holds {key!r}, which is not understood")
    for name in linears:
        if _names(left_out, name):
            raise FormatError(
                f"modules_to_not_convert leaves out {name!r}; ternary and dense layers in one model"
                " are not supported"
            )
    if not _names(left_out, "lm_head"):
        raise FormatError(
            "modules_to_not_convert does not name 'lm_head'; a head that is a BitLinear is not"
            " supported"
        )


def _names(keys: list[str], module: str) -> bool:
    """Whether transformers would leave out a module: by its beginning, a pattern or its end."""
    edge = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{k}){edge}", module) or module.endswith(k) for k in keys)


def stored_matrix(
    source: TensorSource, name: str, shape: tuple[int, int], how: BitLinears
) -> Quantised:
    """The BitLinear `name` (a published name without ".weight"): values and one scale.

    Raises FormatError for a tensor that is missing or has another shape, and a scale that is none;
    reading raises it for values that are not ternary.
    """
    weight = f"{name}.weight"
    held = source.quantised(weight) if weight in source.shapes() else None
    if held is not None:
        if held.kind != "ternary" or held.group:
            raise FormatError(f"{weight!r} is not ternary with one scale")
        return held.checked(weight)
    if how.online:
        return _masters(source, weight, shape)
    whole = not how.divide and _whole_shape(source, weight) == shape
    packed = shape if whole else _packed_shape(shape)
    if whole:
        read: Callable[[slice], NDArray[np.int8]] = _Unpacked(source, weight)
    elif source.byte_shapes().get(weight) == packed and source.left_out[weight] in _UNSIGNED:
        read = _Packed(source, weight, shape[0])
    else:
        raise _misshapen(source, weight, [packed] if how.divide else [packed, shape])
    stored = _one_number(source, f"{name}.weight_scale")
    scale = np.float32(1.0) / stored if how.divide else stored
    return Quantised("ternary", shape, 0, np.array([scale], np.float32), read).checked(weight)


def _packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if shape[0] % _PER_BYTE:
        raise FormatError(f"{shape[0]} outputs cannot be packed: {_PER_BYTE} does not divide them")
    return shape[0] // _PER_BYTE, shape[1]


def _whole_shape(source: TensorSource, name: str) -> tuple[int, ...] | None:
    if name in source.byte_shapes() and source.left_out[name] not in _UNSIGNED:
        return source.byte_shapes()[name]
    return source.shapes().get(name)


def _misshapen(source: TensorSource, name: str, wanted: list[tuple[int, int]]) -> FormatError:
    shape = source.byte_shapes().get(name, source.shapes().get(name))
    if shape is None:
        return FormatError(missing_tensor(source, name))
    words = " or ".join(
        f"{'packed uint8' if i == 0 else 'ternary values'} {list(w)}" for i, w in enumerate(wanted)
    )
    dtype = source.left_out.get(name, "float")
    return FormatError(f"{name!r} has shape {list(shape)} ({dtype}), the config asks for {words}")


def _one_number(source: TensorSource, name: str) -> np.float32:
    shapes = source.shapes()
    if name not in shapes:
        raise FormatError(missing_tensor(source, name))
    if math.prod(shapes[name]) != 1:
        raise FormatError(f"{name!r} has shape {list(shapes[name])}; it must be one number")
    value = np.float32(source.read(name).reshape(-1)[0])
    if not value > 0:
        raise FormatError(f"{name!r} is {value}; a scale is above 0")
    return value


@dataclass(frozen=True)
class _Packed:
    """Rows of a weight packed four rows a byte."""

    source: TensorSource
    name: str
    outputs: int

    def __call__(self, rows: slice) -> NDArray[np.int8]:
        start, stop, _ = rows.indices(self.outputs)
        quarter = self.outputs // _PER_BYTE
        parts = []
        for place in range(_PER_BYTE):
            low, high = max(start - place * quarter, 0), min(stop - place * quarter, quarter)
            if low < high:
                stored = self.source.read_bytes(self.name, slice(low, high))
                parts.append((stored >> np.uint8(2 * place)) & np.uint8(3))
        codes = np.concatenate(parts)
        if np.any(codes == 3):
            raise FormatError(f"{self.name!r} holds the illegal code 3")
        return codes.astype(np.int8) - np.int8(1)


@dataclass(frozen=True)
class _Unpacked:
    """Rows of a weight whose values are stored as they are: -1, 0 and 1."""

    source: TensorSource
    name: str

    def __call__(self, rows: slice) -> NDArray[np.int8]:
        if self.name in self.source.byte_shapes():
            values = self.source.read_bytes(self.name, rows)
        else:
            values = self.source.read(self.name, rows)
        stray = ~np.isin(values, (-1, 0, 1))
        if np.any(stray):
            raise FormatError(
                f"{self.name!r} lies beside a weight_scale but holds {values[stray].flat[0]}, which"
                " is none of -1, 0 and 1"
            )
        return values.astype(np.int8)


def _masters(source: TensorSource, name: str, shape: tuple[int, int]) -> Quantised:
    if source.shapes().get(name) != shape:
        if name not in source.shapes():
            raise FormatError(missing_tensor(source, name))
        raise FormatError(
            f"{name!r} has shape {list(source.shapes()[name])}, the config asks for {list(shape)}"
        )
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    blocks = (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))
    mean = absmean_scale(source.read(name, rows) for rows in blocks)
    inverse = np.float32(1.0) / mean  # by which the published code multiplies, and divides

    def read(rows: slice) -> NDArray[np.int8]:
        return ternarise(source.read(name, rows), mean)

    scale = np.array([np.float32(1.0) / inverse], np.float32)
    return Quantised("ternary", shape, 0, scale, read, functools.partial(source.read, name))
