"""What a packed model directory holds: names, dtypes, shapes and order of its tensors.

Legend: V vocabulary (of an FFF: rows, trees * nodes), D hidden size, N/K rows and columns of a
linear layer. docs/formats.md tells the format in prose; this file and that page are the only two
places.
"""

from __future__ import annotations

from typing import Any

from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.packing import PACKINGS, row_bytes

FORMAT = "nomatmul-packed"
FORMAT_VERSION = 1
EMBEDDING_FORMS = ("bf16", "int8", "f32")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"

# The rows of an FFF are read one by one, at random: always in the form that is quickest to unpack.
FFF_PACKING = "2bit"

_CONFIG_KEYS = {"format", "format_version", "packing", "embedding", "model"}


def packed_matrices(config: ModelConfig, packing: str) -> dict[str, tuple[int, str]]:
    """Return {name of a packed tensor: (true length of its rows, "2bit" or "1.6bit")}."""
    linears = architecture_of(config).linears()
    found = {f"{name}.packed": (linear.inputs, packing) for name, linear in linears.items()}
    for name, (_, columns) in fff_rows(config).items():
        found[f"{name}.packed"] = (columns, FFF_PACKING)
    return found


def fff_rows(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {name of an FFF's rows: (V, D)}; empty for a model without FFF layers.

    Row v holds the node's input weights and, beside them, its output weights, because a visit
    reads both: "layers.N.channel.rows.packed" is [V, 2, bytes of a row of D].
    """
    trees = architecture_of(config).trees()
    return {f"{name}.rows": (part.rows, part.size) for name, part in trees.items()}


def active_rows(config: ModelConfig) -> int:
    """Return how many rows of an FFF a token visits: depth + 1 of each tree; 0 without trees."""
    if config.fff_trees is None or config.fff_depth is None:
        return 0
    return config.fff_trees * (config.fff_depth + 1)


def packed_tensors(
    config: ModelConfig, packing: str, embedding_form: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {name: (safetensors dtype, shape)} in the order in which the file holds them.

    Packed matrices come first (their lengths are multiples of 32 bytes, so every one of them
    and every float32 behind them is aligned), then the float32 vectors, then the embedding.
    Raises ValueError for a model that cannot be packed or an unknown form.
    """
    check_packable(config, packing, embedding_form)
    model = architecture_of(config)
    linears = model.linears()
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.packed": ("U8", (linear.outputs, row_bytes(linear.inputs, packing)))
        for name, linear in linears.items()
    }
    trees = fff_rows(config)
    for name, (rows, columns) in trees.items():
        tensors[f"{name}.packed"] = ("U8", (rows, 2, row_bytes(columns, FFF_PACKING)))
    for name, linear in linears.items():
        tensors[f"{name}.scale"] = ("F32", (1,))
        tensors[f"{name}.norm.weight"] = ("F32", (linear.inputs,))
    for name, (rows, columns) in trees.items():
        channel = name.removesuffix(".rows")
        tensors[f"{name}.scale"] = ("F32", (2,))
        tensors[f"{channel}.norm_in.weight"] = ("F32", (columns,))
        tensors[f"{channel}.norm_out.weight"] = ("F32", (rows,))
    for name, shape in model.norm_tensors().items():
        tensors[name] = ("F32", shape)
    for name, size in model.lower_bounds().items():
        tensors[name] = ("F32", (size,))
    table = (config.vocab_size, config.hidden_size)
    if embedding_form == "int8":
        tensors["embedding.scale"] = ("F32", (config.vocab_size,))
        tensors["embedding.weight"] = ("I8", table)
    else:
        tensors["embedding.weight"] = ("BF16" if embedding_form == "bf16" else "F32", table)
    return tensors


def check_packable(config: ModelConfig, packing: str, embedding_form: str) -> None:
    """Raise ValueError, naming the part, for a model that a packed directory cannot hold."""
    if config.linear != "ternary":
        raise ValueError(
            f"only linear 'ternary' models can be packed, this one is {config.linear!r}"
        )
    capability.check(config, "packed")
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r} is unknown; legal values are '2bit', '1.6bit'")
    if embedding_form not in EMBEDDING_FORMS:
        raise ValueError(
            f"embedding form {embedding_form!r} is unknown; legal values are 'bf16', 'int8', 'f32'"
        )


def packed_config_dict(config: ModelConfig, packing: str, embedding_form: str) -> dict[str, Any]:
    """Return what config.json of a packed directory says."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "packing": packing,
        "embedding": embedding_form,
        "model": config.to_dict(),
    }


def parse_packed_config(values: dict[str, Any]) -> tuple[ModelConfig, str, str]:
    """Return (config, packing, embedding form) from the dict of config.json.

    Raises FormatError for another format, a newer version, or a key that is unknown or missing.
    """
    if "format" not in values and "model_type" in values:
        raise FormatError("this model is not packed; `nomatmul pack` makes a packed one of it")
    if values.get("format") != FORMAT:
        raise FormatError(f"format {values.get('format')!r} is not {FORMAT!r}")
    version = values.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FormatError(
            f"format_version {version!r} is unknown; this nomatmul reads version {FORMAT_VERSION}"
        )
    unknown, missing = set(values) - _CONFIG_KEYS, _CONFIG_KEYS - set(values)
    if unknown or missing:
        word, key = ("unknown", min(unknown)) if unknown else ("missing", min(missing))
        raise FormatError(f"{word} config key {key!r}")
    packing, embedding_form = values["packing"], values["embedding"]
    config = ModelConfig.from_dict(values["model"])
    check_packable(config, packing, embedding_form)
    return config, packing, embedding_form
