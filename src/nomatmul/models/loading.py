"""Reading checkpoints into a model, and refusing what cannot be read rightly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nomatmul.formats.encoder import HEAD_FIELDS
from nomatmul.models.config import (
    CausalLMConfig,
    EncoderConfig,
    PublishedConfig,
    PublishedEncoderConfig,
)

_PUBLISHED = {PublishedConfig.model_type, PublishedEncoderConfig.model_type}
_ENCODERS = {EncoderConfig.model_type, PublishedEncoderConfig.model_type}
_KINDS = _PUBLISHED | _ENCODERS | {CausalLMConfig.model_type}
_HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin")


def load_pretrained(cls: Any, inherited: Callable, path: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of our models; `inherited` is transformers' own, for own checkpoints.

    Without `dtype` the model computes in float32, also when the file holds 16-bit values: a 16-bit
    residual stream flips int8 roundings and moved the logits of a recorded model by 3.5 %.
    """
    if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
        kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = torch.float32
    config = read_config(path)
    if config is None:  # a hub name, or a directory without config.json: transformers decides
        config, path = _from_hub(path, kwargs)
    if config.get("format") == "nomatmul-packed":
        raise ValueError(
            f"{path} is a packed model: the engine loads it (nomatmul.load), torch does not"
        )
    kind = config.get("model_type")
    if kind not in _KINDS:
        legal = ", ".join(map(repr, sorted(_KINDS)))
        raise ValueError(f"{path}: model_type {kind!r} is not one of {legal}")
    if (kind in _ENCODERS) != issubclass(cls.config_class, EncoderConfig):
        what = "an encoder: use MaskedLM" if kind in _ENCODERS else "a decoder: use CausalLM"
        raise ValueError(f"{path} is {what}, not {cls.__name__}")
    if kind in _PUBLISHED:
        return _load_published(cls, Path(path), config, kwargs)
    return _load_own(cls, inherited, path, args, kwargs)


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


def _from_hub(name: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    options = {k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
    config, _ = CausalLMConfig.get_config_dict(name, **options)
    if config.get("model_type") not in _PUBLISHED:
        return config, name
    from huggingface_hub import snapshot_download

    return config, snapshot_download(str(name), allow_patterns=list(_HUB_FILES), **options)


def _load_own(cls: Any, inherited: Callable, path: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = inherited(path, *args, output_loading_info=True, **kwargs)
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(f"cannot load {path}: {first[0] if first else error!r}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"cannot load {path}: damaged file: {error}") from error
    missing, unexpected, mismatched = (
        {str(name) for name in info.get(f"{what}_keys", ())}
        for what in ("missing", "unexpected", "mismatched")
    )
    refuse_odd(cls, path, missing, unexpected, mismatched)
    check_finite(model, path)
    return (model, info) if with_info else model


def refuse_odd(
    cls: Any,
    path: Any,
    missing: set[str],
    unexpected: set[str],
    mismatched: set[str] = frozenset(),  # type: ignore[assignment]
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
            raise ValueError(f"{path}: {what} tensor {', '.join(sorted(names)[:3])}{more}")
    if fresh:
        warnings.warn(
            f"{path} has no {', '.join(sorted(fresh))}: drawn at random, train before use",
            stacklevel=5,
        )


def _wanted_dtype(dtype: Any, config: dict[str, Any]) -> torch.dtype:
    if dtype == "auto":
        dtype = config.get("dtype", config.get("torch_dtype")) or "float32"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not a float type of torch")
    return dtype


def _load_published(cls: Any, path: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    from nomatmul.formats.checkpoint import open_checkpoint

    dtype = _wanted_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")), config)
    device = kwargs.get("device_map")
    if isinstance(device, dict):
        device = device.get("")
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = cls(_config_of_published(cls, path, checkpoint, kwargs))
    model.tie_weights()  # not all versions of transformers tie what lies on the meta device
    expected = dict(model.named_parameters())
    names = set(checkpoint.names())
    missing = set(expected) - names
    refuse_odd(cls, path, missing, names - set(expected))
    for name, parameter in expected.items():
        if name in missing:
            loaded = torch.empty(parameter.shape, dtype=dtype)
        else:
            tensor = torch.from_numpy(checkpoint.read(name))
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the config says "
                    f"{tuple(parameter.shape)}"
                )
            # A copy: what the reader returns may be a read-only view of a mapped file.
            loaded = tensor.to(dtype=dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(loaded))
    for owner in {name.rpartition(".")[0] for name in missing}:
        model._init_weights(model.get_submodule(owner))
    model.tie_weights()
    check_finite(model, path)
    model.config.dtype = dtype
    if device is not None and device != "auto":
        model.to(device)
    elif device == "auto" and torch.cuda.is_available():
        model.to("cuda")
    model.eval()
    return model


def _config_of_published(cls: Any, path: Path, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
    """The config of the class to be made; of `kwargs` counts what a classifier may be told."""
    given = kwargs.get("config")
    if isinstance(given, cls.config_class):  # an Auto class has read and changed it already
        return given
    options: dict[str, Any] = {"name_or_path": str(path)}
    if checkpoint.reading is not None:
        head = checkpoint.reading.head
        options |= {name: getattr(head, name) for name in HEAD_FIELDS}
        if checkpoint.reading.labels:
            options["id2label"] = dict(enumerate(checkpoint.reading.labels))
        for name in (*HEAD_FIELDS, "num_labels", "id2label", "label2id", "problem_type"):
            if name in kwargs:
                options[name] = kwargs[name]
    return cls.config_class.from_model_config(checkpoint.config, **options)


def check_finite(model: nn.Module, path: Any) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")


def save_tokenizer(model: Any, directory: Path) -> None:
    """Write the model's tokenizer.json beside its weights, if it has one."""
    if model.tokenizer is not None:
        model.tokenizer.save(str(directory / "tokenizer.json"))
