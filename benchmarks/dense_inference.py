"""Transformer++ for inference, as fast as plain torch makes it: the baseline of inference_gpu.py.

bfloat16 weights, one product for q, k, v and one for gate and up, flash attention, a static
key-value cache, compiled blocks, and the whole decode step in a CUDA graph that feeds itself.

Shape suffixes: T tokens, D hidden, M intermediate, H heads, E elements of a head, S slots of the
cache, V vocabulary.

A library of inference_gpu.py.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass
class Layer:
    """Weights of one block, bfloat16, and its cache [2, H, S, E]."""

    norm_D: Tensor
    qkv_3DD: Tensor
    o_DD: Tensor
    channel_norm_D: Tensor
    gate_up_2MD: Tensor
    down_DM: Tensor
    cache_2HSE: Tensor


def block(
    x_TD: Tensor,
    norm_D: Tensor,
    qkv_3DD: Tensor,
    o_DD: Tensor,
    channel_norm_D: Tensor,
    gate_up_2MD: Tensor,
    down_DM: Tensor,
    cache_2HSE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    first: int,
) -> Tensor:
    """One block for tokens `first` to first + T of the sequence; writes their keys and values."""
    tokens, width = x_TD.shape
    heads, size = cache_2HSE.shape[1], cache_2HSE.shape[3]
    qkv = F.linear(norm(x_TD, norm_D), qkv_3DD).view(tokens, 3, heads, size)
    q_HTE, k_HTE, v_HTE = qkv.permute(1, 2, 0, 3).unbind(0)
    q_HTE, k_HTE = rotate(q_HTE, cos_TE, sin_TE), rotate(k_HTE, cos_TE, sin_TE)
    cache_2HSE[0, :, first : first + tokens] = k_HTE
    cache_2HSE[1, :, first : first + tokens] = v_HTE
    seen = cache_2HSE[:, :, : first + tokens]
    keys, values = (k_HTE, v_HTE) if first == 0 else (seen[0], seen[1])
    y_HTE = F.scaled_dot_product_attention(
        q_HTE[None], keys[None], values[None], is_causal=first == 0
    )[0]
    x_TD = x_TD + F.linear(y_HTE.transpose(0, 1).reshape(tokens, width), o_DD)
    gate, up = F.linear(norm(x_TD, channel_norm_D), gate_up_2MD).chunk(2, dim=-1)
    return x_TD + F.linear(F.silu(gate) * up, down_DM)


def norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, 1e-6)


def rotate(x_HTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x_HTE.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_TE - second * sin_TE, second * cos_TE + first * sin_TE], -1)
    return turned.to(x_HTE.dtype)


class Dense:
    """A Transformer++ with random weights for one sequence of at most `slots` tokens."""

    def __init__(
        self, shape: tuple[int, int, int, int], vocabulary: int, slots: int, device: str
    ) -> None:
        layers, width, inner, heads = shape
        self.device, self.slots = device, slots
        self.dtype = torch.bfloat16

        def random(*size: int) -> Tensor:
            # Weights of this size keep the residual stream finite over 40 layers.
            return torch.randn(size, device=device, dtype=self.dtype).mul_(0.02)

        def ones() -> Tensor:
            return torch.ones(width, device=device, dtype=self.dtype)

        size = width // heads
        self.layers = [
            Layer(
                ones(), random(3 * width, width), random(width, width), ones(),
                random(2 * inner, width), random(width, inner),
                torch.zeros(2, heads, slots, size, device=device, dtype=self.dtype),
            )
            for _ in range(layers)
        ]  # fmt: skip
        self.embedding_VD, self.head_VD = random(vocabulary, width), random(vocabulary, width)
        self.final_D = ones()
        power = torch.arange(0, size, 2, device=device).float() / size
        angle = torch.outer(torch.arange(slots, device=device).float(), 10000.0**-power)
        self.cos_SE, self.sin_SE = angle.cos(), angle.sin()
        self.block: Any = block
        self.compiled = False

    def compile(self) -> None:
        """Compile the block: one graph for prefill, one for a decode step."""
        self.block = torch.compile(block, dynamic=False)
        self.compiled = True

    def forward(self, ids_T: Tensor, first: int) -> Tensor:
        """Logits [V] after the last of the tokens, which stand at `first` in the sequence."""
        x_TD = F.embedding(ids_T, self.embedding_VD)
        span = slice(first, first + len(ids_T))
        cos_TE, sin_TE = self.cos_SE[span], self.sin_SE[span]
        for layer in self.layers:
            x_TD = self.block(
                x_TD, layer.norm_D, layer.qkv_3DD, layer.o_DD, layer.channel_norm_D,
                layer.gate_up_2MD, layer.down_DM, layer.cache_2HSE, cos_TE, sin_TE, first,
            )  # fmt: skip
        return F.linear(norm(x_TD[-1:], self.final_D), self.head_VD)[0]

    def decoder(self, context: int) -> Any:
        """A function that queues one greedy token after `context` ones; it feeds itself.

        On a GPU one CUDA graph, at a fixed position: every call reads the weights and the cache of
        `context` tokens as the real next token would.
        """
        token = torch.zeros(1, dtype=torch.long, device=self.device)

        def step() -> None:
            token.copy_(self.forward(token, context).argmax(-1, keepdim=True))

        if not self.device.startswith("cuda"):
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self.token = token
        return graph.replay

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decoded token reads of the weights: all but the embedding's other rows."""
        own = [t for layer in self.layers for t in vars(layer).values()]
        cache = sum(layer.cache_2HSE.nbytes for layer in self.layers)
        return sum(t.nbytes for t in own) - cache + self.head_VD.nbytes

    def cache_bytes(self, context: int) -> int:
        return sum(layer.cache_2HSE.nbytes for layer in self.layers) * context // self.slots


def prepared(dense: Dense, ids_T: Tensor, context: int) -> tuple[Any, float]:
    """Compile and warm up; the decode step and the seconds it took. Falls back to eager blocks."""
    began = time.perf_counter()
    try:
        dense.compile()
        step = _warm(dense, ids_T, context)
    except Exception as error:  # a compiler that fails must not cost the baseline its row
        print(f"torch.compile failed, eager blocks: {type(error).__name__}: {error}"[:500])
        torch._dynamo.reset()
        dense.block, dense.compiled = block, False
        step = _warm(dense, ids_T, context)
    return step, time.perf_counter() - began


def _warm(dense: Dense, ids_T: Tensor, context: int) -> Any:
    for _ in range(2):
        dense.forward(ids_T, 0)
    step = dense.decoder(context)
    step()
    return step
