"""The causal language model: embedding, equal blocks, final norm, head; for every dial.

Shape suffixes: B sequences, T new steps, S steps seen so far and now, D hidden, V vocabulary,
L layers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from nomatmul.formats.architecture import architecture_of
from nomatmul.models.base import TextModel
from nomatmul.models.hf.arguments import refuse_unknown
from nomatmul.models.hf.cache import LIBRARY_NAME, StateCache, one_cache, takes_cache
from nomatmul.models.hf.config import CausalLMConfig
from nomatmul.models.layers import (
    XAVIER_GAIN,
    DenseLinear,
    LayerNorm,
    RMSNorm,
    TernaryLinear,
    linear_of,
)
from nomatmul.models.losses import share_of_batch
from nomatmul.models.mixer import Mixer, Pass
from nomatmul.models.stored import StoredEmbedding, StoredHead, store, unstore
from nomatmul.ops.loss import Taught

_LOGPROB_CHUNK = 512


def cumulative_lower_bounds(table_LD: Tensor) -> Tensor:
    """Floors of the forget gates, float32 [L, D]: cumsum(softmax over layers) minus its first row.

    They rise with depth from zero, so deeper layers remember longer (arXiv 2311.04823).
    """
    share_LD = torch.softmax(table_LD.float(), dim=0)
    return torch.cumsum(share_LD, dim=0) - share_LD[0]


class CausalLM(TextModel, GenerationMixin):
    """MatMul-free LM, Transformer++ and what lies between, chosen by the config's dials.

    Tensor names are those of nomatmul's training checkpoints. `from_pretrained` reads own
    directories and published ones; `save_pretrained` writes safetensors. Ternary weights that were
    published as values and scales stay so (`config.stored_linears`) and compute only; `to_latents`
    makes weights of them that train.

    Initial weights follow what the authors' code does, not what it seems to do. Their MLGRU
    draws all four projections Xavier-uniform with gain 2^-2.5 and marks them as initialised, so
    transformers' later pass does not touch them, and `o_proj` is not scaled down. The rest is
    normal with `initializer_range`; their loop over "o_proj.weight" and "down_proj.weight" sees
    names relative to each sub-module and so takes effect once, on the channel mixer's
    `down_proj`, which is divided by sqrt(2 L). Attention (the Transformer++ twin) is normal with
    `o_proj` divided by sqrt(2 L), as in GPT-2. Trees are normal, too, as in the authors' whole
    models (2311.10770). Lower bounds and biases start at zero, norms at one.
    """

    config_class = CausalLMConfig
    config: CausalLMConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 (transformers' form)
    _is_stateful = True

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)
        model = config.model_config
        if not model.causal:
            raise ValueError("CausalLM needs causal=True; this config describes an encoder")
        if model.positions == "sinusoidal":
            raise ValueError("CausalLM has positions 'rotary' or 'none', not 'sinusoidal'")
        parts = self._build_body(model)
        self.lower_bounds: nn.Parameter | None = None
        if parts.bounded:
            self.lower_bounds = nn.Parameter(torch.zeros(model.num_layers, model.hidden_size))
        self.head = linear_of(parts.head)
        if config.stored_linears:
            store(self)
            if isinstance(self.embedding, StoredEmbedding) and parts.head.tied:
                self.head = StoredHead(self.embedding)
                self._tied_weights_keys = {}  # the head reads the table where it lies
        pieces = [piece for block in parts.blocks for piece in block.mixer.state()]
        self.attends_only = all(piece.grows for piece in pieces)
        self.loss_type = "ForCausalLM"  # Trainer then does not count the first label of a row
        self._plan_initial_weights()
        self.post_init()

    # -- what transformers asks for -------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache that its token mixer needs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; the cache may have either of its names.

        Equal with and without cache, for greedy, sampled and beam search. Assisted generation is
        refused: it rolls the cache back, which a recurrent state cannot be.
        """
        kwargs = one_cache(kwargs, LIBRARY_NAME)
        plan = kwargs.get("generation_config") or self.generation_config
        chunk = kwargs.get("prefill_chunk_size") or getattr(plan, "prefill_chunk_size", None)
        wanted = kwargs.get("use_cache", getattr(plan, "use_cache", None)) is not False
        if chunk is not None and wanted and LIBRARY_NAME not in kwargs:
            kwargs[LIBRARY_NAME] = self._cache(None, True)  # chunks need one from the start
        return super().generate(*args, **kwargs)

    def _plan_initial_weights(self) -> None:
        """Tell each linear layer its standard deviation; MLGRU's keep Xavier-uniform.

        transformers shows `_init_weights` only modules that own parameters, so a container
        cannot do it for its layers.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        if isinstance(self.head, TernaryLinear | DenseLinear):
            self.head.initial_std = std
        for module in self.modules():
            if isinstance(module, Mixer):
                module.plan_weights(std, residual_std)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerNorm | Mixer):
            module.reset_parameters()
        elif isinstance(module, TernaryLinear | DenseLinear):
            if module.initial_std is None:
                nn.init.xavier_uniform_(module.weight, gain=XAVIER_GAIN)
            else:
                nn.init.normal_(module.weight, 0.0, module.initial_std)
        elif isinstance(module, CausalLM) and module.lower_bounds is not None:
            nn.init.zeros_(module.lower_bounds)

    def to_latents(self) -> None:
        """Make weights that train of the stored ternary values; changes nothing without any.

        The latent float32 weights lie so that training's quantiser gives the same values, and the
        same scales up to rounding. Raises ValueError, with the model as it was, for a scale
        below the least of training's.
        """
        if not self.config.stored_linears:
            return
        unstore(self)
        if isinstance(self.head, StoredHead):
            with torch.device("meta"):  # its weight is the embedding's
                self.head = linear_of(architecture_of(self.model_config).head)
            self._tied_weights_keys = type(self)._tied_weights_keys
        del self.config.stored_linears
        self.tie_weights()

    # -- the forward pass -----------------------------------------------------------------------

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Final-normed hidden states [B, T, D], what the head reads.

        cache is changed in place; collect, a list, receives the input of every block and the
        result. Raises ValueError for ids out of range, an empty sequence or a wrong mask.
        """
        x = self._embed(input_ids, inputs_embeds)
        bounds: list[Tensor | None] | None = None
        if self.lower_bounds is not None:
            # layer 0 has none: its gate may fall to zero
            bounds = [None, *cumulative_lower_bounds(self.lower_bounds)[1:].unbind(0)]
        past = cache.get_seq_length() if cache is not None else 0
        tokens = Pass(x, attention_mask, past=past, position_ids=position_ids, lower_bounds=bounds)
        x = self._through_blocks(x, tokens, cache=cache, collect=collect)
        if isinstance(cache, StateCache):
            cache.seen += x.shape[1]
        return x

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x = self._token_embeddings(input_ids, inputs_embeds)
        if input_ids is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual_dtype or torch.get_autocast_dtype(x.device.type))
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _cache(self, cache: Any, use_cache: bool | None) -> Any:
        if cache is None:
            wanted = use_cache
            if wanted is None:
                wanted = self.config.use_cache and not self.training
            if not wanted:
                return None
            return DynamicCache() if self.attends_only else StateCache(len(self.layers))
        if not self.attends_only and not isinstance(cache, StateCache):
            raise ValueError(
                f"a cache of type {type(cache).__name__} does not fit: a recurrent model keeps a "
                "StateCache"
            )
        return cache

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V] of the next token at each position, and the loss if labels are given.

        input_ids: integers [B, T]; attention_mask: [B, S], 0 for padding, anywhere in a row: such
        positions are as if they were not there (their own logits mean nothing). labels: [B, T],
        the same ids (they are shifted here), -100 where nothing is to be learnt. In training mode
        with labels the logits are not returned. num_items_in_batch: what the sum of the losses is
        divided by, None for the number of labels. cache: from an earlier output (transformers'
        older name for it is taken, too); it is changed in place, and padding of the past counts
        as padding only if attention_mask covers the past. logits_to_keep: only the last so many
        positions, 0 for all, or a tensor of their indices.

        Returns CausalLMOutputWithPast, or its tuple when return_dict is False. Raises ValueError
        for an argument that is unknown.
        """
        refuse_unknown("CausalLM.forward", kwargs)
        cache = self._cache(cache, use_cache)
        collect = self._collector(output_hidden_states)
        hidden = self.hidden(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            cache=cache,
            collect=collect,
        )
        loss = logits = None
        if labels is not None:
            loss, _ = self.loss_of_hidden(hidden[:, :-1], labels[:, 1:])
            loss = share_of_batch(loss, labels[:, 1:], num_items_in_batch)
        if labels is None or not self.training:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.head(hidden[:, kept])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{LIBRARY_NAME: cache})
        return self._answer(output, collect, return_dict)

    def loss(
        self, input_ids: Tensor, targets: Tensor, *, chunk: int = 0, taught: Taught | None = None
    ) -> tuple[Tensor, ...]:
        """(mean cross-entropy in nats, z) of targets [B, T] given input_ids [B, T], not shifted.

        The trainer's path: no cache, no logits kept. chunk: see `chunked_cross_entropy`. taught:
        with a teacher, which has looked at input_ids; what `mixed_cross_entropy` gives.
        """
        hidden = self.hidden(input_ids)
        if taught is not None:
            return self.mixed_loss_of_hidden(hidden, targets, taught=taught, chunk=chunk)
        return self.loss_of_hidden(hidden, targets, chunk=chunk)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text embeddings [B, D] of length 1: the hidden state of each row's last real token."""
        hidden_BTD = self.hidden(input_ids, attention_mask)
        last = hidden_BTD[:, -1]
        if attention_mask is not None:
            steps_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            last_B = (attention_mask.bool() * steps_T).amax(-1)
            last = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return F.normalize(last.float(), dim=-1)

    # -- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def token_logprobs(self, ids: list[int]) -> np.ndarray:
        """log p(ids[t] | ids[:t]) for t = 1.., natural logarithm, float64 [T-1].

        Raises ValueError for an empty list or an id out of range.
        """
        ids_1T = torch.as_tensor(list(ids), dtype=torch.long, device=self.device).reshape(1, -1)
        hidden_TD = self.hidden(ids_1T)[0]
        parts = []
        for start in range(0, len(ids) - 1, _LOGPROB_CHUNK):
            stop = min(start + _LOGPROB_CHUNK, len(ids) - 1)
            logits = self.head(hidden_TD[start:stop]).double()
            picked = ids_1T[0, start + 1 : stop + 1].unsqueeze(-1)
            parts.append(torch.log_softmax(logits, -1).gather(-1, picked).squeeze(-1).cpu())
        return torch.cat(parts).numpy() if parts else np.zeros(0)
