"""Reading checkpoints into a model, and refusing what cannot be read rightly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.encoder import HEAD_FIELDS
from nomatmul.formats.published.llama_source import FAMILIES
from nomatmul.formats.runs import gguf_file
from nomatmul.models.hf.config import (
    CausalLMConfig,
    EncoderConfig,
    PublishedConfig,
    PublishedEncoderConfig,
)
from nomatmul.models.hf.stored import stored_matrices, tensors_of

_GGUF: dict[str, Any] = {"model_type": "gguf"}  # in place of a config.json, for the keys asked
_PUBLISHED = {
    *(PublishedConfig.model_type, PublishedEncoderConfig.model_type, _GGUF["model_type"]),
    *FAMILIES,
}
_ENCODERS = {EncoderConfig.model_type, PublishedEncoderConfig.model_type}
_KINDS = _PUBLISHED | _ENCODERS | {CausalLMConfig.model_type}
_REFUSED = ("variant", "key_mapping", "gguf_file", "state_dict")
_ANCHOR = "embedding.weight"
_HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin")


def load_pretrained(cls: Any, inherited: Callable, path: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of our models; `inherited` is transformers' own, which does the loading.

    A published checkpoint (a directory or a GGUF file), a packed encoder, or one saved from inside
    a wrapper, is given to it as config and tensors by our names; what transformers documents for
    `from_pretrained` so works alike for all kinds, but for what `_translated` refuses by name.

    `latents=True` asks for weights that train in place of stored ternary values: the masters of a
    checkpoint that has some, else as `CausalLM.to_latents` makes them.

    Without `dtype` the model computes in float32, also when the file holds 16-bit values: a 16-bit
    residual stream flips int8 roundings and moved the logits of a recorded model by 3.5 %.
    """
    if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
        kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = torch.float32
    latents = kwargs.pop("latents", False)
    if path is None:  # config and state_dict are given
        return inherited(path, *args, **kwargs)
    place = Path(path) / kwargs.get("subfolder", "")
    gguf = gguf_file(place)
    config = _GGUF if gguf else read_config(place if kwargs.get("subfolder") else path)
    if config is None:  # a hub name, or a directory without config.json: transformers decides
        config, place = _from_hub(path, kwargs)
    packed = "format" in config  # of any version
    if packed and open_checkpoint(place).kind == "packed":  # encoders are opened as floats
        raise ValueError(
            f"{path} is a packed model: the engine loads it (nomatmul.load), torch does not"
        )
    kind = EncoderConfig.model_type if packed else config.get("model_type")
    if kind not in _KINDS:
        if place.is_dir():
            open_checkpoint(place)  # says what is wrong, or what is not computed
        legal = ", ".join(map(repr, sorted(_KINDS - {_GGUF["model_type"]})))
        raise ValueError(f"{path}: model_type {kind!r} is not one of {legal}")
    published = kind in {PublishedConfig.model_type, _GGUF["model_type"], *FAMILIES}
    if (kind in _ENCODERS) != issubclass(cls.config_class, EncoderConfig):
        what = "an encoder: use MaskedLM" if kind in _ENCODERS else "a decoder: use CausalLM"
        raise ValueError(f"{path} is {what}, not {cls.__name__}")
    default = "dense" if kind in _ENCODERS else "ternary"
    ternary = published or config.get("linear", default) == "ternary"
    if ternary and kwargs.get("quantization_config") is not None:
        raise ValueError(f"{path}: quantization_config is not for layers that are ternary already")
    own = bool(config.get("stored_linears"))  # values that no float source has, never wrapped
    wrapped = not own and place.is_dir() and not published and _is_wrapped(place, kwargs)
    translate = kind in _PUBLISHED or wrapped or packed
    _check_dtype(kwargs, config if translate else None)
    if translate:
        kwargs = _translated(cls, place, kwargs, latents)
        return _load(cls, inherited, None, path, args, kwargs)
    loaded = _load(cls, inherited, path, path, args, kwargs)
    if latents and own:
        (loaded[0] if isinstance(loaded, tuple) else loaded).to_latents()
    return loaded


def read_config(path: Any) -> dict[str, Any] | None:
    """config.json of a directory as a dict; None if there is no such file.

    Raises ValueError if the file is no JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        if Path(path).is_dir():
            raise ValueError(f"{path} has no config.json")
        # A hub name is never absolute, and a Path never a hub name.
        if isinstance(path, Path) or Path(path).is_absolute() or str(path).startswith("."):
            what = "is not a directory" if Path(path).exists() else "does not exist"
            raise ValueError(f"{path} {what}; a model is a directory with a config.json")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return config


def _from_hub(name: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """(config, directory of the files) of a hub name; own checkpoints are left to transformers."""
    words = ("revision", "cache_dir", "token", "force_download", "local_files_only")
    options = {k: kwargs[k] for k in words if k in kwargs}
    folder = kwargs.get("subfolder", "")
    config, _ = CausalLMConfig.get_config_dict(name, subfolder=folder, **options)
    if config.get("model_type") not in _PUBLISHED:
        return config, Path(name)
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/{file}" if folder else file for file in _HUB_FILES]
    return config, Path(snapshot_download(str(name), allow_patterns=patterns, **options)) / folder


def _load(
    cls: Any, inherited: Callable, source: Any, path: Any, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """source: what `inherited` loads from, None for the tensors in kwargs; path: for messages."""
    with_info = kwargs.pop("output_loading_info", False)
    resized = kwargs.pop("ignore_mismatched_sizes", False)
    kwargs["ignore_mismatched_sizes"] = True  # refused below, by name
    try:
        model, info = inherited(source, *args, output_loading_info=True, **kwargs)
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(f"cannot load {path}: {first[0] if first else error!r}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"cannot load {path}: damaged file: {error}") from error
    missing, unexpected, mismatched = (
        {str(name[0] if isinstance(name, tuple) else name) for name in info.get(f"{what}_keys", ())}
        for what in ("missing", "unexpected", "mismatched")
    )
    if resized:  # the caller asked for fresh tensors where sizes differ
        mismatched = set()
    refuse_odd(cls, path, missing, unexpected, mismatched)
    check_finite(model, path)
    return (model, info) if with_info else model


def refuse_odd(
    cls: Any,
    path: Any,
    missing: Set[str],
    unexpected: Set[str],
    mismatched: Set[str] = frozenset(),
) -> None:
    """Raises ValueError for tensors too few, too many or misshapen.

    A class may allow what a checkpoint of another task lacks or has too many of; it says so once.
    """
    fresh = {name for name in missing if name.startswith(cls.new_tensors)}
    spare = {name for name in unexpected if name.startswith(cls.spare_tensors)}
    odd = {"missing": missing - fresh, "unexpected": unexpected - spare, "mismatched": mismatched}
    for what, names in odd.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"cannot load {path}: {what} tensor {', '.join(sorted(names)[:3])}{more}"
            )
    if fresh:
        warnings.warn(
            f"{path} has no {', '.join(sorted(fresh))}: drawn at random, train before use",
            stacklevel=5,
        )


def _check_dtype(kwargs: dict[str, Any], config: dict[str, Any] | None) -> None:
    """Give `kwargs` one `dtype`, of torch. Raises ValueError for what is no float type.

    "auto" is the type that `config` names; None leaves it to transformers.
    """
    given = kwargs.pop("torch_dtype", None)
    dtype = kwargs.get("dtype") if kwargs.get("dtype") is not None else given
    if dtype == "auto" and config is None:
        kwargs["dtype"] = dtype
        return
    if dtype == "auto":
        assert config is not None
        dtype = config.get("dtype", config.get("torch_dtype")) or "float32"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not a float type of torch")
    kwargs["dtype"] = dtype


def _is_wrapped(place: Path, kwargs: dict[str, Any]) -> bool:
    """Do an own checkpoint's tensors have names that only our reader understands?"""
    if any(kwargs.get(word) is not None for word in _REFUSED):
        return False
    from nomatmul.formats.files.weights import open_source
    from nomatmul.formats.files.wrappers import plain_names

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the tensors are read
            source = open_source(place)
        removed = plain_names(source.shapes(), [_ANCHOR])[1]
        return source.nested or bool(source.left_out) or bool(removed)
    except ValueError:  # transformers says what is wrong, or knows a file that we do not
        return False


def _translated(
    cls: Any, place: Path, kwargs: dict[str, Any], latents: bool = False
) -> dict[str, Any]:
    """The arguments under which transformers loads the checkpoint in `place` from memory.

    Raises ValueError for what cannot be had of a checkpoint that is translated.
    """
    for word in _REFUSED:
        if kwargs.pop(word, None) is not None:
            raise ValueError(f"{place}: {word} is not supported for this kind of checkpoint")
    _check_format(place, kwargs.pop("use_safetensors", None))
    for word in ("subfolder", "revision", "force_download"):  # they said which files, found by now
        kwargs.pop(word, None)
    checkpoint = open_checkpoint(place)
    given = kwargs.pop("config", None)
    if isinstance(given, str | Path):
        given = AutoConfig.from_pretrained(given)
    if given is None:
        given, kwargs = _config_of(cls, place, checkpoint, kwargs)
    if type(given) is not cls.config_class:
        kind = type(given).__name__
        raise ValueError(f"config must be a {cls.config_class.__name__}, got {kind}")
    given.name_or_path = str(place)  # where the tokenizer lies
    stored = stored_matrices(checkpoint)
    if stored and not latents:
        given.stored_linears = True
    # Copies: what the reader returns may be a read-only view of a mapped file.
    state = {
        name: torch.from_numpy(np.array(checkpoint.read(name))).to(kwargs["dtype"])
        for name in checkpoint.names()
        if name not in stored
    }
    for name, matrix in stored.items():
        state |= tensors_of(name, matrix, latents)
    return {**kwargs, "config": given, "state_dict": state}


def _check_format(place: Path, safetensors: bool | None) -> None:
    found = any(place.glob("model*.safetensors"))
    if safetensors is not None and safetensors != found:
        other = "only pickled weights" if safetensors else "safetensors, which are read first"
        raise ValueError(f"{place}: use_safetensors={safetensors}, but it holds {other}")


def _config_of(
    cls: Any, place: Path, checkpoint: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The config of the class to be made with what `kwargs` changes in it, and the rest of them."""
    options: dict[str, Any] = {"name_or_path": str(place)}
    if checkpoint.reading is not None:
        head = checkpoint.reading.head
        options |= {name: getattr(head, name) for name in HEAD_FIELDS}
        if checkpoint.reading.labels:
            options["id2label"] = dict(enumerate(checkpoint.reading.labels))
    values = cls.config_class.from_model_config(checkpoint.config, **options).to_dict()
    dtype = kwargs.pop("dtype")
    config, rest = cls.config_class.from_dict(values, return_unused_kwargs=True, **kwargs)
    return config, {**rest, "dtype": dtype}


def check_finite(model: nn.Module, path: Any) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")


def save_tokenizer(model: Any, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json beside the weights, if the model has one."""
    from nomatmul.formats.tokenizer import save_tokenizer as save

    if model.tokenizer is not None:
        source = Path(model.config._name_or_path) if model.config._name_or_path else None
        save(model.tokenizer, directory, model.config.model_config, source)
