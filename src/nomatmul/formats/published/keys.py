"""Keys of a published config.json that we do not read: harmless, worth a warning, or refused.

A key that is null or false switches nothing on. A key whose words are those of a model's
mathematics may change what is computed, and is refused by name; any other that is unknown (the
mark of a tool) is ignored with a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject

# Keys of Hugging Face configs that cannot change what the forward pass computes.
HARMLESS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size custom_pipelines
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size experts_implementation exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label
    is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - a list of these would be three times as long
)
# They choose a kernel, or concern training or a tokenizer.
_KERNEL_KEYS = frozenset(
    """
    attention_dropout fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fuse_swiglu
    gradient_checkpointing hidden_dropout max_seq_length model_max_length mask_token_id
    pretraining_tp sparse_prediction use_fused_cross_entropy use_fused_norm use_flash_attn
    use_l2warp unk_token_id
    """.split()  # noqa: SIM905 - as above
)
_MATHEMATICS = frozenset(
    """
    act activation alibi attention attn bias biases bidirectional bitlinear bitnet bits cap cla
    clamp clip compression conv cope depth dilation dim dims eps expand expert experts factor
    feedforward ffn gate gated gates gating glu group groups hadamard head heads inner kernel layer
    layers linear logn lora mixer mixers mlp moe mrope mscale multiplier multipliers mup norm
    normalization norms ntk position positions prism qk qkv quant quantisation quantization
    quantized ratio residual rope rotary rotation router scale scales scaling sink sinks size sizes
    softcap softcapping softmax sparse state states swiglu ternary tie tied type types width window
    yoco
    """.split()  # noqa: SIM905 - as above
)


def sort_keys(values: JsonObject, known: Iterable[str]) -> tuple[str, ...]:
    """The keys of `values` that are ignored though they are set and nobody here knows them.

    Raises FormatError naming one that may change what the model computes.
    """
    read = {*known, *HARMLESS_KEYS, *_KERNEL_KEYS}
    unknown = [k for k, v in values.items() if k not in read and v is not None and v is not False]
    for key in sorted(unknown):
        words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
        if _MATHEMATICS & set(words):
            raise FormatError(
                f"unknown published config key {key!r}: it may change what the model computes"
            )
    return tuple(sorted(unknown))


def warn_ignored(keys: Iterable[str]) -> None:
    """Name the keys in a warning, if there are any."""
    if keys:
        names = ", ".join(map(repr, keys))
        # always from this line: Python shows one text from one line once
        warnings.warn(f"published config: ignored the unknown key {names}", stacklevel=1)


def end_tokens(value: Any) -> Any:
    """`eos_token_id` as Hugging Face writes it: an id or a list of them; -1 stands for none."""
    if isinstance(value, list):
        return tuple(token for token in value if token != -1)
    return None if value == -1 else value


def is_one_of(value: object, legal: tuple[object, ...]) -> bool:
    return any(
        value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in legal
    )
