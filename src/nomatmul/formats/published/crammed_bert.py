"""Published `crammedBERT` checkpoints (UltraFastBERT, arXiv 2311.10770): the config.

Facts follow the authors' code: `intermed_size` of an "fff" is the number of trees and
`intermed_depth` their depth in decisions; of a "ff" with a glu it counts gate and up together. The
tensors are in crammed_bert_source.py.
"""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderHead
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.keys import end_tokens, is_one_of, sort_keys, warn_ignored

MODEL_TYPE = "crammedBERT"
# Option (a dot for each level of nesting) -> the values under which the model is the one that we
# compute. All are below "arch".
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "architectures": (["ScriptableCrammedBERT"],),
    "norm": ("LayerNorm",),
    "norm_scheme": ("pre",),
    "tie_weights": (True,),
    "decoder_bias": (False,),
    "objective_layout": ("MLM",),
    "loss": ("cross-entropy",),
    "ffn_layer_frequency": (1,),
    "skip_head_transform": (True,),
    "use_bias": (False,),
    "final_norm": (True,),
    "attention.type": ("self-attention",),
    "attention.causal_attention": (False,),
    "attention.qkv_bias": (False,),
    "attention.rotary_embedding": (False,),
    "attention.sequence_op": ("torch-softmax",),
    "attention.skip_output_projection": (False,),
}
_POSITIONS = {"scaled-sinusoidal": "sinusoidal", None: "none", "none": "none"}
_NONLINEARITIES = {
    "GELU": ("ffn", "gelu"),
    "SiLU": ("ffn", "silu"),
    "ReLU": ("ffn", "relu"),
    "GELUglu": ("glu", "gelu"),
    "SiLUglu": ("glu", "silu"),
    "ReLUglu": ("glu", "relu"),
}
_REQUIRED = (
    "hidden_size",
    "num_transformer_layers",
    "intermed_size",
    "nonlin",
    "norm_eps",
    "embedding.vocab_size",
    "embedding.embedding_dim",
    "embedding.max_seq_length",
    "embedding.pos_embedding",
    "embedding.normalization",
    "attention.num_attention_heads",
)
# Read, or without effect on what the forward pass computes in float32.
_OTHER = frozenset(
    """
    attention.dropout_prob attention.high_level_fusion attention.low_level_fusion
    attention.seq_op_in_fp32 classification_head.classifier_dropout classification_head.head_dim
    classification_head.include_ff_layer classification_head.nonlin classification_head.pooler
    embedding.dropout_prob embedding.pad_token_id embedding.stable_low_precision hidden_dropout_prob
    init.std init.type intermed_depth intermed_type num_labels sparse_prediction
    """.split()  # noqa: SIM905 - a list of these would be three times as long
)


def encoder_from_published(values: JsonObject) -> tuple[ModelConfig, EncoderHead]:
    """Translate the dict of a published config.json.

    Raises FormatError naming the option for one that we do not compute, an unknown key of "arch"
    or an illegal value; warns of other keys that are unknown.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise FormatError(
            f"model_type {values.get('model_type')!r} is not the published {MODEL_TYPE!r}"
        )
    warn_ignored(ignored_keys(values))
    if not isinstance(values.get("arch"), dict):
        raise FormatError("a published crammedBERT config needs the object 'arch'")
    arch = _flat(values["arch"])
    # each of these describes the architecture: one that is unknown and set is never harmless
    known = {*_ONLY_VALUES, *_REQUIRED, *_OTHER}
    unknown = sorted(k for k, v in arch.items() if k not in known and v not in (None, False, {}))
    if unknown:
        raise FormatError(f"unknown published config key 'arch.{unknown[0]}'")
    for key, legal in _ONLY_VALUES.items():
        if arch.get(key) is not None and not is_one_of(arch[key], legal):
            choices = " or ".join(map(repr, legal))
            raise FormatError(f"arch.{key} {arch[key]!r} is not supported; it must be {choices}")
    missing = [key for key in _REQUIRED if key not in arch]
    if missing:
        raise FormatError(f"the published config lacks 'arch.{missing[0]}'")
    try:
        trained = values.get("architectures") == ["ScriptableLMForSequenceClassification"]
        return _model(arch, values), _head(arch, pool_padding=trained)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"published config: {error}") from None


def ignored_keys(values: JsonObject) -> tuple[str, ...]:
    """Keys of a published config.json that are set, unknown, and ignored; see `sort_keys`."""
    tokens = {"pad_token_id", "bos_token_id", "eos_token_id"}
    return sort_keys(values, {"arch", "model_type", "tie_word_embeddings", *tokens})


def _flat(values: JsonObject, prefix: str = "") -> JsonObject:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: JsonObject = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _model(arch: JsonObject, values: JsonObject) -> ModelConfig:
    hidden, positions = arch["hidden_size"], arch["embedding.pos_embedding"]
    if arch["embedding.embedding_dim"] != hidden:
        raise FormatError(
            f"arch.embedding.embedding_dim {arch['embedding.embedding_dim']!r} is not supported; "
            f"it must be hidden_size {hidden!r}"
        )
    if positions not in _POSITIONS:
        raise FormatError(
            f"arch.embedding.pos_embedding {positions!r} is not supported; it must be "
            "'scaled-sinusoidal' or null"
        )
    std = arch.get("init.std", 0.02) if arch.get("init.type", "normal") == "normal" else 0.02
    return ModelConfig(
        vocab_size=arch["embedding.vocab_size"],
        hidden_size=hidden,
        num_layers=arch["num_transformer_layers"],
        token_mixer="attention",
        linear="dense",
        causal=False,
        num_heads=arch["attention.num_attention_heads"],
        max_position_embeddings=arch["embedding.max_seq_length"],
        norm="layer",
        norm_eps=arch["norm_eps"],
        positions=_POSITIONS[positions],
        embedding_norm=arch["embedding.normalization"],
        tie_embeddings=True,
        initializer_range=std,
        pad_token_id=arch.get("embedding.pad_token_id"),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=end_tokens(values.get("eos_token_id")),
        **_channel(arch),
    )


def _channel(arch: JsonObject) -> JsonObject:
    kind, nonlinearity, size = (
        arch.get("intermed_type", "ff"),
        arch["nonlin"],
        arch["intermed_size"],
    )
    if nonlinearity not in _NONLINEARITIES:
        choices = ", ".join(map(repr, _NONLINEARITIES))
        raise FormatError(f"arch.nonlin {nonlinearity!r} is not supported; it must be {choices}")
    mixer, activation = _NONLINEARITIES[nonlinearity]
    if kind == "fff":
        if mixer == "glu":
            raise FormatError(f"arch.nonlin {nonlinearity!r} is not supported in an 'fff'")
        return {
            "channel_mixer": "fff",
            "activation": activation,
            "fff_trees": size,
            "fff_depth": arch.get("intermed_depth"),
            "fff_bias": True,
        }
    if kind != "ff":
        raise FormatError(f"arch.intermed_type {kind!r} is not supported; it must be 'ff' or 'fff'")
    if mixer == "glu":
        if not isinstance(size, int) or size % 2:
            raise FormatError(f"arch.intermed_size {size!r} of a glu must be an even number")
        # the authors count gate and up together
        return {
            "channel_mixer": mixer,
            "glu_activation": activation,
            "intermediate_size": size // 2,
        }
    return {"channel_mixer": mixer, "activation": activation, "intermediate_size": size}


def _head(arch: JsonObject, pool_padding: bool) -> EncoderHead:
    """The authors' code pools over padding too: a classifier that it has trained expects that."""
    prefix = "classification_head."
    wide = arch.get(f"{prefix}include_ff_layer", True)
    nonlinearity = str(arch.get(f"{prefix}nonlin", "Tanh")).removesuffix("glu").lower()
    return EncoderHead(
        pooler=arch.get(f"{prefix}pooler", "avg"),
        pooler_size=arch.get(f"{prefix}head_dim", 1024) if wide else None,
        pooler_activation=nonlinearity,
        pool_padding=pool_padding,
        hidden_dropout=arch.get("hidden_dropout_prob", 0.1),
        classifier_dropout=arch.get(f"{prefix}classifier_dropout", 0.1),
    )
