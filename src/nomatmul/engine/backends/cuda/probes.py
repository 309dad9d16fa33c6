"""Single products of a model on the device, as numpy arrays: what tests and doctor compare.

Legend: T tokens, K columns, N rows of a linear layer, D hidden size, A active rows of an FFF.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nomatmul.engine.backends.cuda import fff, launch

if TYPE_CHECKING:
    import torch

    from nomatmul.engine.backends.cuda.forward import Forward
    from nomatmul.engine.backends.cuda.weights import DeviceWeights


class Probes:
    """The part of CudaBackend that runs one product alone."""

    weights: DeviceWeights
    device: torch.device
    forward: Forward

    def _scratch(self, tokens: int) -> Tensor | None:
        raise NotImplementedError

    def _put(self, array: np.ndarray) -> Tensor:
        raise NotImplementedError

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        raise NotImplementedError

    def accumulate(self, linear: str, q_TK: np.ndarray) -> np.ndarray:
        """Exact int32 [T, N] of int8 [T, K] and one linear layer: for tests."""
        place = self.weights.slot(f"{linear}.packed")
        quantised = self._quantised(q_TK, place.shape[-1])
        scratch = self._scratch(len(q_TK))
        with self._on_device():
            return self.forward.product(quantised, place[None], scratch)[0].cpu().numpy()

    def walk(self, rows: str, q_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(visited rows, accumulators) int32 [T, A] of int8 [T, D] in one FFF: for tests."""
        place, trees = self.weights.slot(f"{rows}.packed"), self.weights.plan.trees
        assert trees is not None
        with self._on_device():
            quantised = self._quantised(q_TD, place.shape[-1])
            found = fff.walk(quantised, place, trees.trees, trees.depth)
            return found[0].cpu().numpy(), found[1].cpu().numpy()

    def combine(self, rows: str, q_TA: np.ndarray, rows_TA: np.ndarray) -> np.ndarray:
        """Exact int32 [T, D] of int8 [T, A] and the rows visited: for tests."""
        place = self.weights.slot(f"{rows}.packed")
        with self._on_device():
            acc_TD = fff.combine(self._put(q_TA), self._put(rows_TA), place, self.weights.plan.size)
            return acc_TD.cpu().numpy()

    def _quantised(self, q_TK: np.ndarray, row_bytes: int) -> launch.Quantised:
        quantised = launch.Quantised(1, len(q_TK), row_bytes, self.device)
        padded = np.zeros((len(q_TK), 4 * row_bytes), np.int8)
        padded[:, : q_TK.shape[1]] = q_TK
        planes = padded.reshape(len(q_TK), row_bytes, 4).transpose(0, 2, 1)
        quantised.q_CTK[0] = self._put(np.ascontiguousarray(planes).reshape(len(q_TK), -1))
        return quantised
