"""Captured CUDA graphs of the general path: hundreds of launches become one.

Legend: S sequences, T tokens, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nomatmul.engine.backends.cuda.device import describe
from nomatmul.engine.backends.cuda.launch import Stretches

if TYPE_CHECKING:
    from nomatmul.engine.backends.cuda.forward import Forward


class Graph:
    """A captured step of S sequences, one token each: set ids and states, replay, read logits."""

    def __init__(self, forward: Forward, shape: tuple[int, int], count: int) -> None:
        device = forward.weights.device
        self.ids_S = torch.zeros(count, dtype=torch.int32, device=device)
        self.states_SLD = torch.zeros((count, *shape), dtype=torch.float32, device=device)
        numbers = torch.arange(count + 1, dtype=torch.int32, device=device)
        # kept, as all that a replay reads: a graph knows addresses, not tensors
        self.stretches = Stretches(numbers[:count], numbers, 1)

        def run() -> Tensor:
            x_SD = forward.embed(self.ids_S)
            return forward.head(forward.blocks(x_SD, self.states_SLD, self.stretches))

        try:
            self.graph, self.logits_SV = captured(run, device)
        except torch.OutOfMemoryError:
            raise ValueError(f"too little memory on {device} to decode {count} sequences") from None
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"a triton kernel failed on {device}: {describe(error)}") from error


class PromptGraph:
    """A captured block of at most so many tokens of one sequence. The rows behind its end compute
    something that nobody reads: tokens meet in the scan alone, which ends where they do."""

    def __init__(
        self, forward: Forward, shape: tuple[int, int], tokens: int, scratch: Tensor | None
    ) -> None:
        device = forward.weights.device
        self.ids_T = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self.states_SLD = torch.zeros((1, *shape), dtype=torch.float32, device=device)
        self.scratch = scratch
        first = torch.zeros(1, dtype=torch.int32, device=device)
        self.stretches = Stretches(first, self.starts, tokens)

        def run() -> Tensor:
            x_TD = forward.embed(self.ids_T)
            return forward.blocks(x_TD, self.states_SLD, self.stretches, scratch)

        self.graph, self.x_TD = captured(run, device)

    def replay(self, ids_T: Tensor, state_LD: Tensor) -> Tensor:
        """Advance the state in place; return x [T, D], valid until the next replay."""
        self.ids_T.zero_()
        self.ids_T[: len(ids_T)] = ids_T
        self.starts[1] = len(ids_T)
        self.states_SLD[0] = state_LD
        self.graph.replay()
        state_LD.copy_(self.states_SLD[0])
        return self.x_TD[: len(ids_T)]


def captured(
    run: Callable[[], Tensor], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of what `run` launches, and its result; run is called twice."""
    new_stream: Any = torch.cuda.Stream  # which torch itself does not type
    stream = new_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # compiles the kernels
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # torch's own stream for captures belongs to whichever GPU was the first to be captured; what
    # other threads do meanwhile on the device is no part of the graph and no error
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph, result
