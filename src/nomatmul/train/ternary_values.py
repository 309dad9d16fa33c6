"""The model of a finished run as others keep it: ternary values and scales, never quantised again.

Training's checkpoints hold latent floats. What is handed on holds each weight's value, and numbers
that float16 has for scales, embedding and head, so that packing, GGUF and floats for transformers
are the same model.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import nn

from nomatmul.formats.chat_template import TEMPLATE_FILE
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import new_directory
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.runs import MODEL_STEP_FILE
from nomatmul.formats.tokenizer import JSON_FILE, load_tokenizer, save_tokenizer
from nomatmul.models import CausalLM
from nomatmul.models.stored import stored_state
from nomatmul.train.checkpoints import writing
from nomatmul.train.conversations import stored_template, write_chat
from nomatmul.train.model import no_progress_bars

_TABLES = ("embedding.weight", "head.weight")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_values(model: CausalLM, tokens: ModelConfig | None = None) -> CausalLM:
    """A model that computes with the values of this one's latent weights and float16 scales.

    Embedding and head are rounded to float16, too, where its range is enough; other tensors are
    shared. tokens: whose start, end and padding tokens it has. A model that has
    values already keeps them.
    """
    config = copy.deepcopy(model.config)
    for name in _TOKENS if tokens is not None else ():
        setattr(config, name, getattr(tokens, name))
    config.stored_linears = True
    with torch.device("meta"):
        stored = CausalLM(config)
    state = stored_state(model)
    for name in _TABLES:
        if name in state and bool((short := state[name].half()).isfinite().all()):
            state[name] = short.float()
    stored.load_state_dict(state, assign=True)
    stored.tie_weights()
    assert not any(tensor.is_meta for tensor in nn.Module.state_dict(stored).values())
    return stored.eval()


def write_values(directory: Path, teacher: Path, tokens: ModelConfig) -> None:
    """Write the finished model in `directory` anew, in place: ternary values and scales.

    teacher: directory of the model that it was made of, whose chat template, sampling defaults and
    names of special tokens go along; tokens: that model's config. The template of conversations
    that it was trained on comes first. A directory that has been written so stays as it is.
    Raises CheckpointError when the disk is full; the directory is as it was then.
    """
    with no_progress_bars():
        model = CausalLM.from_pretrained(directory)
    if model.config.stored_linears:
        return
    tokenizer, template = load_tokenizer(directory), stored_template(directory)
    with writing(directory), new_directory(directory) as temporary:
        stored = with_values(model, tokens)
        with no_progress_bars():
            stored.save_pretrained(temporary)
        for name in (TEMPLATE_FILE, GENERATION_FILE):
            if (teacher / name).is_file():
                shutil.copyfile(teacher / name, temporary / name)
        if template is not None:
            write_file(temporary / JSON_FILE, tokenizer.to_str().encode("utf-8"))
            write_chat(temporary, tokenizer, template)
        save_tokenizer(tokenizer, temporary, stored.model_config, source=teacher)
        shutil.copyfile(directory / MODEL_STEP_FILE, temporary / MODEL_STEP_FILE)
