"""A published decoder of Llama's shape, seen through our names: `open_family`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import Architecture, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.files.quantised import Quantised, read_stacked, stacked
from nomatmul.formats.files.source import TensorSource
from nomatmul.formats.files.wrappers import missing_tensor, unwrapped
from nomatmul.formats.published import bitnet, llama, mistral, qwen3
from nomatmul.formats.published.bit_linear import stored_matrix
from nomatmul.formats.published.keys import warn_ignored
from nomatmul.formats.published.llama_form import Form, find_form
from nomatmul.formats.published.llama_like import check_options, config_of, ignored_keys
from nomatmul.formats.published.llama_names import ANCHORS, HEAD, Names
from nomatmul.formats.published.mlx import MlxSource, split_config
from nomatmul.formats.published.ternary_values import ternary_matrix

FAMILIES = {
    family.model_type: family
    for family in (bitnet.FAMILY, llama.FAMILY, mistral.FAMILY, qwen3.FAMILY)
}

# Model types of which some weights look like those above, and what is missing to compute them.
REFUSED = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen35", "qwen3_next"), "gated delta layers"),
    **dict.fromkeys(("qwen3_moe", "mixtral", "qwen2_moe", "qwen3_5_moe"), "experts"),
    **dict.fromkeys(("minicpm", "minicpm3", "minicpm4"), "multipliers and longrope"),
    **dict.fromkeys(("gemma3", "gemma3_text"), "norms behind layers, a scaled embedding, windows"),
    "qwen2": "biases of q, k and v",
}

# Tables that older transformers stored though they follow from the config.
_TABLES = re.compile(r"\.rotary_emb\.(?:(?:original_)?inv_freq|(?:cos|sin)_cached)$")


def check_config(values: JsonObject) -> None:
    """Raise FormatError, by name, for an option of a config.json (of FAMILIES) that we do not
    compute."""
    values, _ = split_config(values)
    family = FAMILIES[values["model_type"]]
    check_options(family, values)
    ignored_keys(family, values)


def open_family(
    values: JsonObject, source: TensorSource, where: Path
) -> tuple[ModelConfig, LlamaSource]:
    """The config and the tensors of a published model, by our names.

    values: its config.json, of FAMILIES. Raises FormatError as `check_config`, and for tensors that
    are missing, misshapen, or not what they should be.
    """
    check_config(values)
    values, packing = split_config(values)
    family = FAMILIES[values["model_type"]]
    ignored = ignored_keys(family, values)
    warn_ignored(ignored)
    source = source if packing is None else MlxSource(source, packing)
    source = unwrapped(source, ANCHORS, where)
    names = Names(source)
    form = find_form(family, values, source, names)
    config = config_of(family, values, form.dials)
    found = LlamaSource(source, config, form, names)
    found.ignored = ignored
    return config, found


class LlamaSource(TensorSource):
    """Tensors by our names: gate over up, norms renamed, ternary matrices as whole numbers.

    `form` says what was found of their weights, `ignored` which keys of the config were ignored.
    Raises FormatError for tensors that are missing, misshapen or unknown.
    """

    ignored: tuple[str, ...] = ()

    def __init__(self, source: TensorSource, config: ModelConfig, form: Form, names: Names) -> None:
        self.nested, self.left_out, self.form = source.nested, {}, form
        self._source, self._held = source, dict[str, Quantised]()
        model = architecture_of(config)
        self._shapes = model.tensors()
        self._parts: dict[str, list[str]] = {}
        for name in self._shapes:
            linear = name.removesuffix(".weight")
            if linear in model.linears():
                parts = [f"{part}.weight" for part in names.parts(linear, apart=form.apart)]
            else:
                parts = [names.vector(name, source.shapes(), sub_norms=form.norms == "sub")]
            self._parts[name] = parts
        if config.tie_embeddings and f"{HEAD}.weight" in source.shapes():
            self._shapes["head.weight"] = source.shapes()[f"{HEAD}.weight"]
            self._parts["head.weight"] = [f"{HEAD}.weight"]
        self._bits = () if form.bits is None else tuple(_block_linears(model))
        self._ternary = _ternary_tensors(model, config)
        self._check()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        if name in self._bits:  # what others store are the values already
            return self._one_scale(name).floats(rows)
        whole = slice(0, self._shapes[name][0]) if rows is None else rows
        parts = self._parts[name]
        readers = [functools.partial(self._source.read, part) for part in parts]
        return read_stacked(readers, self._starts(name), whole)

    def quantised(self, name: str) -> Quantised | None:
        shape, parts = self._shapes[name], self._parts[name]
        if len(shape) != 2:
            return None
        if name in self._bits:
            return self._one_scale(name)
        if name in self._ternary:
            return stacked([self._grouped(part, self._cut(name)) for part in parts])
        held = [self._source.quantised(part) for part in parts]
        whole = [part for part in held if part is not None and part.kind == "int8"]
        return stacked(whole) if len(whole) == len(parts) else None

    def _one_scale(self, name: str) -> Quantised:
        """Of a model with int8 activations; kept, because masters are read for their mean."""
        if name not in self._held:
            assert self.form.bits is not None
            stored = [part.removesuffix(".weight") for part in self._parts[name]]
            held = [
                stored_matrix(self._source, part, self._cut(name), self.form.bits)
                for part in stored
            ]
            self._held[name] = stacked(held)
        return self._held[name]

    def _cut(self, name: str) -> tuple[int, int]:
        """The shape of each of the published matrices that one of ours is made of."""
        rows, columns = self._shapes[name]
        return rows // len(self._parts[name]), columns

    def _grouped(self, part: str, shape: tuple[int, int]) -> Quantised:
        held = self._source.quantised(part)
        if held is not None and held.kind == "ternary":
            return held.grouped(self.form.group)
        return ternary_matrix(functools.partial(self._source.read, part), shape, self.form.group)

    def _starts(self, name: str) -> NDArray[np.int64]:
        count = len(self._parts[name])
        return np.arange(count + 1) * (self._shapes[name][0] // count)

    def _check(self) -> None:
        """Every tensor is there, has its shape and has a use."""
        stored, used = self._source.shapes(), set[str]()
        for name, parts in self._parts.items():
            used.update(parts)
            if name in self._bits:
                self._one_scale(name)
                used.update(f"{part}_scale" for part in parts)
                continue
            cut = (self._shapes[name][0] // len(parts), *self._shapes[name][1:])
            for part in parts:
                if part not in stored:
                    raise FormatError(missing_tensor(self._source, part))
                if stored[part] != cut:
                    raise FormatError(
                        f"{part!r} has shape {list(stored[part])}, the config asks for {list(cut)}"
                    )
        extra = {*stored, *self._source.byte_shapes()} - used
        extra = {name for name in extra if not _TABLES.search(name)}
        if extra:
            raise FormatError(f"holds the unknown tensor {min(extra)!r}")


def _block_linears(model: Architecture) -> Iterator[str]:
    return (f"{name}.weight" for name in model.linears() if name != "head")


def _ternary_tensors(model: Architecture, config: ModelConfig) -> set[str]:
    """Names of the matrices that are ternary by their values."""
    if not config.scale_group:
        return set()
    found = {
        f"{name}.weight" for name, linear in model.linears().items() if linear.kind == "ternary"
    }
    if config.embedding_linear == "ternary":
        found.add("embedding.weight")
    return found
