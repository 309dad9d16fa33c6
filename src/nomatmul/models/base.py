"""What the language model and the encoders share: files, tokenizer, head loss, training dials.

Shape suffixes: B sequences, T steps, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nomatmul.formats.architecture import Architecture, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.models.block import RECOMPUTE, Block
from nomatmul.models.channels.trees import FFFTraining, TreeLayer, auxiliary_loss, set_fff_training
from nomatmul.models.hf.loading import load_pretrained, save_tokenizer
from nomatmul.models.hf.resize import resize_vocabulary
from nomatmul.models.layers import DenseLinear, LayerNorm, RMSNorm, TernaryLinear, norm_of
from nomatmul.models.losses import head_loss, mixed_head_loss
from nomatmul.models.mixer import Pass
from nomatmul.models.stored import (
    AnyHead,
    StoredEmbedding,
    StoredHead,
    StoredLinear,
    embedding_of,
)
from nomatmul.ops.loss import Mixed, Taught

_ID_TYPES = (torch.int64, torch.int32)  # what nn.Embedding takes


class TextModel(PreTrainedModel):
    """A stack of blocks over token embeddings; subclasses add `hidden` and what reads it.

    Those that predict tokens own a `head`.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, see `share_of_batch`
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' form)
    _supports_sdpa = True

    embedding: nn.Embedding | StoredEmbedding
    embedding_norm: RMSNorm | LayerNorm | None
    layers: nn.ModuleList
    final_norm: nn.Module
    head: AnyHead
    _tokenizer: Any = None
    new_tensors: tuple[str, ...] = ()
    """Prefixes of tensors that a checkpoint of another task may lack: they are drawn anew."""
    spare_tensors: tuple[str, ...] = ()
    """Prefixes of tensors that a checkpoint of another task may have too many."""

    residual_dtype: torch.dtype | None = None
    """Type of the residual stream under autocast: None for autocast's own, or torch.float32.

    For every dial alike. Without autocast the stream has the embedding's type.
    """

    def _build_body(self, config: ModelConfig) -> Architecture:
        """Make what all models have before their heads; returns the description."""
        model = architecture_of(config)
        norm = model.embedding_norm
        self.model_config = config
        self.embedding = embedding_of(model.embedding)
        self.embedding_norm = norm_of(norm) if norm is not None else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = norm_of(model.final_norm)
        self.gradient_checkpointing = False
        return model

    @property
    def blocks(self) -> list[Block]:
        """`layers` by their type; a compiled or sharded block still has a block's fields."""
        return cast(list[Block], list(self.layers))

    # -- what transformers asks for -------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not isinstance(value, nn.Embedding | StoredEmbedding):
            raise ValueError(f"the embedding must be an nn.Embedding, got {type(value).__name__}")
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if not isinstance(new_embeddings, TernaryLinear | DenseLinear | StoredLinear | StoredHead):
            kind = type(new_embeddings).__name__
            raise ValueError(f"the head must be a linear layer of nomatmul's, got {kind}")
        self.head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the vocabulary's size, see `resize_vocabulary`; returns the embedding.

        pad_to_multiple_of: round the number up to a multiple of this. Both None change nothing.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        step = pad_to_multiple_of
        if step is not None:
            if isinstance(step, bool) or not isinstance(step, int) or step < 1:
                raise ValueError(f"pad_to_multiple_of must be a number above 0, got {step!r}")
            size = -(-size // step) * step
        if new_num_tokens is not None or size != self.config.vocab_size:
            resize_vocabulary(self, size, around_mean=mean_resizing)
        return cast(nn.Embedding, self.embedding)

    # -- files ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an own or a published checkpoint: a directory or a hub name.

        Takes transformers' arguments; `dtype` (a torch dtype, its name, or "auto" for the file's
        own) is honoured for both, and is float32 unless given. Raises ValueError for a packed
        directory (the engine loads those), missing, unknown or misshapen tensors and values that
        are not finite.
        """
        return load_pretrained(
            cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write config.json and safetensors (sharded when large); tokenizer.json if known."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        save_tokenizer(self, Path(save_directory))
        return result

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.json beside the weights as a `tokenizers.Tokenizer`, None if absent."""
        if self._tokenizer is None:
            path = Path(self.config._name_or_path or ".") / "tokenizer.json"
            if self.config._name_or_path and path.is_file():
                from nomatmul.formats.tokenizer import load_tokenizer

                self._tokenizer = load_tokenizer(path)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    # -- what the trainer sets ------------------------------------------------------------------

    def set_recompute(self, mode: str, layers: int | None = None) -> None:
        """What training computes again in the backward pass instead of remembering it.

        "none": nothing that costs a product; "mlp": the channel mixer, of a fused one only the
        product of gate and up; "block": everything, each block remembers its input (a fused
        block also its middle). layers: only the first so many, the others keep everything, for
        memory that is between two modes; None for all. Raises ValueError for another mode.
        """
        if mode not in RECOMPUTE:
            raise ValueError(f"recompute {mode!r} is not known: use one of {', '.join(RECOMPUTE)}")
        for index, layer in enumerate(self.blocks):
            layer.recompute = mode if layers is None or index < layers else "none"

    def set_full_precision(self, on: bool) -> None:
        """Whether weights of ternary layers are multiplied as they are, from now on.

        Norms inside and int8 activations stay, and what is saved or packed is rounded as ever.
        """
        for module in self.modules():
            if isinstance(module, TernaryLinear | TreeLayer):
                module.full_precision = on

    def set_fff_training(self, plan: FFFTraining) -> None:
        """How the FFF layers train from now on; nothing changes in a model without them."""
        set_fff_training(self, plan)

    def auxiliary_loss(self) -> Tensor:
        """The weighted auxiliary losses of the last forward pass, a scalar."""
        return auxiliary_loss(self)

    # -- what every `forward` does with its switches ----------------------------------------------

    def _collector(self, wanted: bool | None) -> list[Tensor] | None:
        """Where hidden states are collected; None if neither the caller nor the config asks."""
        return [] if (self.config.output_hidden_states if wanted is None else wanted) else None

    def _answer(self, output: Any, collect: list[Tensor] | None, return_dict: bool | None) -> Any:
        """The output with its hidden states, as a tuple if the caller or the config wants one."""
        if collect is not None:
            output.hidden_states = tuple(collect)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    # -- inputs and the head's loss -------------------------------------------------------------

    def _check_ids(self, input_ids_BT: Tensor) -> None:
        if not isinstance(input_ids_BT, Tensor) or input_ids_BT.dtype not in _ID_TYPES:
            kind = getattr(input_ids_BT, "dtype", type(input_ids_BT).__name__)
            raise ValueError(f"input_ids must be a tensor of whole numbers, got {kind}")
        if input_ids_BT.dim() != 2 or input_ids_BT.numel() == 0:
            raise ValueError(
                f"input_ids must be [batch, length] with at least one token, got shape "
                f"{tuple(input_ids_BT.shape)}"
            )
        # Looking at the values makes a GPU wait, so training on one leaves it to the data loader.
        if torch.compiler.is_compiling() or (self.training and input_ids_BT.is_cuda):
            return
        low, high = (int(v) for v in torch.aminmax(input_ids_BT))
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is out of range: the vocabulary has {self.config.vocab_size}"
            )

    def _token_embeddings(
        self, input_ids: Tensor | None, inputs_embeds_BTD: Tensor | None
    ) -> Tensor:
        """[B, T, D] of what was given, ids or embeddings. Raises ValueError for both or neither."""
        if (input_ids is None) == (inputs_embeds_BTD is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds_BTD is None:
            assert input_ids is not None
            self._check_ids(input_ids)
            inputs_embeds_BTD = self.embedding(input_ids)
            if isinstance(self.embedding, StoredEmbedding):  # its scales keep their type
                inputs_embeds_BTD = inputs_embeds_BTD.to(self.dtype)
        if inputs_embeds_BTD.dim() != 3 or inputs_embeds_BTD.shape[1] == 0:
            shape = tuple(inputs_embeds_BTD.shape)
            raise ValueError(f"embeddings must be [B, T >= 1, D], got {shape}")
        return inputs_embeds_BTD

    def _through_blocks(
        self,
        x_BTD: Tensor,
        tokens: Pass,
        *,
        cache: Any = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """The final-normed output of all blocks."""
        inputs = [layer.mixer.inputs(tokens) for layer in self.blocks]
        for layer, given in zip(self.blocks, inputs, strict=True):
            if collect is not None:
                collect.append(x_BTD)
            if self.gradient_checkpointing and self.training and cache is None:
                x_BTD = self._gradient_checkpointing_func(layer.__call__, x_BTD, *given)
            else:
                x_BTD = layer(x_BTD, *given, cache=cache)
        x_BTD = self.final_norm(x_BTD)
        if collect is not None:
            collect.append(x_BTD)
        return x_BTD

    def loss_of_hidden(
        self, hidden: Tensor, targets: Tensor, *, chunk: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and z of targets (not shifted), see `chunked_cross_entropy`."""
        return head_loss(self.head, hidden, targets, chunk=chunk)

    def mixed_loss_of_hidden(
        self, hidden: Tensor, targets: Tensor, *, taught: Taught, chunk: int = 0
    ) -> Mixed:
        """The same with a teacher's distribution among the targets, see `mixed_cross_entropy`.

        The head is a BitLinear or a dense one.
        """
        return mixed_head_loss(self.head, hidden, targets, taught=taught, chunk=chunk)
