"""Forward and backward of one micro-batch: launched kernel by kernel, or replayed as a CUDA graph.

A fused model of 370M launches some 1,500 kernels a step, which costs the host about as long as the
GPU needs to run them; a graph replays them all in one launch (docs/log has the figures).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from nomatmul.train.optimizer import Loss, LossParts
from nomatmul.train.plan import DevicePlan


class MicroStep:
    """Adds one micro-batch's gradients to the parameters'. loss: as from `build_loss`."""

    def __init__(self, loss: Loss, z_loss: float = 0.0) -> None:
        self.loss, self.z_loss = loss, z_loss
        self.failed: str | None = None  # why the step could not be recorded
        # what the last micro-batch's loss gave besides, detached, by its name in metrics.jsonl
        self.beside: dict[str, Tensor] = {}

    def __call__(self, x_BT: Tensor, y_BT: Tensor, weight: Tensor, first: bool) -> Tensor:
        """The unweighted loss of the text, detached; weight: what it counts in the gradient.

        first: of the optimiser step, whose gradients are new.
        """
        parts = LossParts(*self.loss(x_BT, y_BT))
        target = parts.total + self.z_loss * parts.z if self.z_loss else parts.total
        if parts.auxiliary is not None:
            target = target + parts.auxiliary
        (target * weight).backward()
        self.beside = parts.beside()
        return (parts.total if parts.plain is None else parts.plain).detach()

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """After the optimiser step."""
        optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Call it between steps when the model computes otherwise from now on."""


class GraphedMicroStep(MicroStep):
    """The same through CUDA graphs, for one GPU and batches of one shape.

    The first optimiser step runs without a graph: it compiles kernels and makes the optimiser's
    state. Then the first micro-batch of a step is recorded, and the later ones, which add to the
    gradients, once more. Gradients stay at one address from then on. A step that cannot be
    recorded runs without a graph, and the reason is said.
    """

    def __init__(self, loss: Loss, z_loss: float, clear_cache: Callable[[], None]) -> None:
        super().__init__(loss, z_loss)
        self.clear_cache = clear_cache
        self.optimizer: torch.optim.Optimizer | None = None  # known once a step has ended
        self.stream = torch.cuda.Stream()
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor, dict[str, Tensor]]] = {}
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x_BT: Tensor, y_BT: Tensor, weight: Tensor, first: bool) -> Tensor:
        """As MicroStep. The result is overwritten by the next call: use it before."""
        if self.optimizer is None or self.failed is not None:
            return super().__call__(x_BT, y_BT, weight, first)
        if self.inputs is None:
            self.inputs = (x_BT.clone(), y_BT.clone(), weight.clone())
        for buffer, value in zip(self.inputs, (x_BT, y_BT, weight), strict=True):
            buffer.copy_(value)
        if first not in self.graphs and not self._record(first):
            return super().__call__(x_BT, y_BT, weight, first)
        graph, loss, self.beside = self.graphs[first]
        graph.replay()
        return loss

    def _record(self, first: bool) -> bool:
        """Record the micro-step on the input buffers; nothing of it runs yet."""
        assert self.inputs is not None
        if first:
            # What the cache holds was made outside: the graph must make it anew at every replay.
            self.clear_cache()
            torch.cuda.empty_cache()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        pool = self.graphs[True][0].pool() if self.graphs else None
        try:
            # thread_local: the loader's thread may pin memory meanwhile
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                loss = super().__call__(*self.inputs, first)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a CUDA call that graphs do not take
            lines = str(error).strip().splitlines()
            self.failed = lines[0] if lines else type(error).__name__
            warnings.warn(
                f"nomatmul: the step cannot be recorded as a CUDA graph ({self.failed}); it is "
                "launched kernel by kernel",
                RuntimeWarning,
                stacklevel=4,
            )
            torch.cuda.synchronize()
            # A recording that breaks off leaves torch's generator in the state of one that goes on,
            # and every later random number on the device would be refused.
            generator.graphsafe_set_state(random_state)
            # Nothing recorded has run: what it left in the cache and in fresh gradients is noise.
            self.clear_cache()
            if first and self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            return False
        self.graphs[first] = (graph, loss, self.beside)
        return True

    def forget(self) -> None:
        """Nothing that is recorded serves: the next step runs without a graph, as the first."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer = None
        self.graphs.clear()
        self.clear_cache()  # its tensors lie in the memory of a graph

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep recorded gradients where they are: the next replay writes over them."""
        if not self.graphs or self.failed is not None:
            super().end(optimizer)
        self.optimizer = optimizer


def build_micro_step(
    loss: Loss, z_loss: float, plan: DevicePlan, clear_cache: Callable[[], None]
) -> MicroStep:
    """The micro-step that the plan asks for."""
    return GraphedMicroStep(loss, z_loss, clear_cache) if plan.graph else MicroStep(loss, z_loss)
