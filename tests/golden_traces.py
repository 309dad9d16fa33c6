"""Golden traces: what small stored models computed before the native graph was rebuilt.

tests/golden/traces/record.py writes them, tests/golden/test_traces.py replays them. A case here
names a stored checkpoint, the forms it is packed in, and what is observed. docs/numerics.md says
which observations are equal bit for bit (decoders, integers, paths) and which are close (encoders).
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from engine_models import state_of
from numpy.typing import NDArray

import nomatmul
from nomatmul.convert import pack
from nomatmul.engine.fff import FFFLayer, pack_rows
from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.safetensors import SafetensorsFile

TRACES = Path(__file__).parent / "golden" / "traces"
Observed = dict[str, NDArray[Any]]

_DECODER = {"vocab_size": 97, "hidden_size": 72, "num_layers": 2, "num_heads": 1}
_ENCODER: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 40,
    "num_layers": 2,
    "token_mixer": "attention",
    "linear": "dense",
    "causal": False,
    "num_heads": 4,
    "max_position_embeddings": 24,
    "intermediate_size": 56,
    "norm": "layer",
    "norm_eps": 1e-12,
    "positions": "sinusoidal",
    "embedding_norm": True,
    "tie_embeddings": True,
}
_TREES = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2, "fff_bias": True}

# Stored checkpoints: config, and of encoders the task and labels.
DECODERS = {
    "decoder-glu": ModelConfig(**_DECODER, intermediate_size=107),
    "decoder-union": ModelConfig(
        **_DECODER, channel_mixer="fff", activation="silu", fff_trees=3, fff_depth=3
    ),
}
ENCODERS: dict[str, tuple[ModelConfig, str, tuple[str, ...]]] = {
    "encoder-fff": (ModelConfig(**_ENCODER, **_TREES), "masked", ()),
    "encoder-ffn": (ModelConfig(**_ENCODER, channel_mixer="ffn"), "sequence", ("no", "so", "yes")),
    "encoder-glu": (
        ModelConfig(
            **{**_ENCODER, "norm": "rms", "norm_eps": 1e-6, "embedding_norm": False},
            channel_mixer="glu",
        ),
        "token",
        ("noun", "verb"),
    ),
    "encoder-master": (
        ModelConfig(
            **{**_ENCODER, "positions": "rotary", "tie_embeddings": False},
            **{**_TREES, "fff_bias": False, "fff_master_width": 9, "fff_layers": (1,)},
            activation="relu",
        ),
        "masked",
        (),
    ),
}

# case: checkpoint and the arguments of pack()
DECODER_CASES: dict[str, tuple[str, dict[str, str]]] = {
    "glu-2bit-int8": ("decoder-glu", {"packing": "2bit", "embedding": "int8"}),
    "glu-1.6bit-bf16": ("decoder-glu", {"packing": "1.6bit", "embedding": "bf16"}),
    "glu-2bit-f32": ("decoder-glu", {"packing": "2bit", "embedding": "f32"}),
    "union-2bit-bf16": ("decoder-union", {"packing": "2bit", "embedding": "bf16"}),
    "union-1.6bit-int8": ("decoder-union", {"packing": "1.6bit", "embedding": "int8"}),
}
ENCODER_CASES: dict[str, tuple[str, dict[str, str]]] = {
    "fff-f32": ("encoder-fff", {"rows": "f32", "dense": "f32", "embedding": "f32"}),
    "fff-bf16": ("encoder-fff", {"rows": "bf16", "dense": "bf16", "embedding": "bf16"}),
    "fff-int8": ("encoder-fff", {"rows": "int8", "dense": "int8", "embedding": "int8"}),
    "fff-rows-int8": ("encoder-fff", {"rows": "int8", "dense": "f32", "embedding": "bf16"}),
    "ffn-f32": ("encoder-ffn", {"dense": "f32", "embedding": "f32"}),
    "ffn-int8": ("encoder-ffn", {"dense": "int8", "embedding": "int8"}),
    "glu-f32": ("encoder-glu", {"dense": "f32", "embedding": "f32"}),
    "glu-int8": ("encoder-glu", {"dense": "int8", "embedding": "bf16"}),
    "master-f32": ("encoder-master", {"rows": "f32", "dense": "f32", "embedding": "f32"}),
}
FFF_FORMS = ("f32", "bf16", "int8", "ternary")
# One directory of each packed container of format version 1, as its first writer left it.
OLD_PACKED = {"packed-decoder-v1": "glu-2bit-int8", "packed-encoder-v1": "fff-f32"}


def packed(case: str, target: Path) -> Path:
    """Pack the checkpoint of a case into the new directory `target`."""
    name, options = {**DECODER_CASES, **ENCODER_CASES}[case]
    pack(TRACES / name, target, check=False, **options)
    return target


def payload_hashes(directory: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes in the weights of a packed directory."""
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: digest(file.read(name)) for name in sorted(file.infos)}


def digest(array: NDArray[Any]) -> str:
    """sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def cuts(count: int, step: int) -> list[int]:
    """Where a prompt of `count` tokens is cut into calls of `step`."""
    return [*range(0, count, step), count]


def run_decoder(lm: LanguageModel, ids: NDArray[np.int32], step: int) -> Observed:
    """Logits [T, V] and the final state [L, D] of a prompt given `step` tokens a call."""
    session = lm.session()
    parts = [
        session.append(ids[first:last], logits="all")
        for first, last in itertools.pairwise(cuts(len(ids), step))
    ]
    return {"logits": np.concatenate(parts), "state": state_of(session)}


def accumulators(lm: LanguageModel, linear: str, q: NDArray[np.int8]) -> NDArray[np.int32]:
    """The integers [T, N] of one linear for int8 inputs [T, K]."""
    backend: Any = lm.backend
    return backend.model.accumulate(linear, q)


def walk(lm: LanguageModel, layer: int, x: NDArray[np.float32]) -> Observed:
    """Rows and logits [T, A] of the walk of a layer's trees."""
    backend: Any = lm.backend
    rows, logits = backend.model.walk(layer, x)
    return {"rows": rows, "logits": logits}


def run_encoder(directory: Path, ids: NDArray[Any], mask: NDArray[Any], **options: Any) -> Observed:
    """Logits with and without the mask, and the paths of each layer of trees."""
    model = nomatmul.load(directory, **options)
    observed = {"logits": model.logits(ids, mask), "logits_nomask": model.logits(ids)}
    for layer, rows in model.paths(ids, mask).items():
        observed[f"path.{layer}"] = rows
    return observed


def fff_layer(form: str, stored: Observed, **options: Any) -> FFFLayer:
    """A layer of 5 trees of depth 3 in one form."""
    rows, scales = pack_rows(stored["w_in"], stored["w_out"], form)
    extra: dict[str, Any] = {"bias": stored["bias"]}
    if form == "ternary":
        extra = {"norm_in": stored["norm_in"], "norm_out": stored["norm_out"]}
    return FFFLayer(form, rows, 5, 3, "gelu", scales=scales, **extra, **options)


def run_fff(form: str, stored: Observed, **options: Any) -> Observed:
    """y [N, D], rows and logits [N, T, L] of one layer of trees."""
    y, paths = fff_layer(form, stored, **options).with_paths(stored["x"])
    return {"y": y, "rows": paths.rows, "logits": paths.logits}


def box_hashes() -> dict[str, str]:
    """sha256 of the packaged model's logits after a few tokens, and of its state."""
    lm = nomatmul.load(threads=2)
    ids = np.array([1, 5, 250, 1000, 77, 3], np.int32) % lm.config.vocab_size
    observed = run_decoder(lm, ids, len(ids))
    return {name: digest(values) for name, values in observed.items()}


def isas() -> list[str]:
    """The instruction sets of this machine."""
    return list(native().kernels.isas())
