"""The self-test of `nomatmul doctor`: each path of the GPU engine on a small random model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nomatmul.engine.backends.cuda.opening import random_backend
from nomatmul.engine.backends.cuda.plan import device_row_bytes
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.reference.trees import walk

if TYPE_CHECKING:
    from nomatmul.engine.backends.cuda.backend import CudaBackend

# No size is a multiple of a tile.
CONFIG = ModelConfig(vocab_size=307, hidden_size=200, num_layers=2, intermediate_size=332)
UNION = ModelConfig(
    vocab_size=307, hidden_size=200, num_layers=2, channel_mixer="fff", activation="silu",
    fff_trees=9, fff_depth=3,
)  # fmt: skip


def devices() -> list[dict[str, Any]]:
    """Name, compute capability and memory (bytes) of every GPU."""
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
        )
    return found


def run_self_test(device: torch.device | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return (the path that decodes, [{"operation", "ok"}]); equality is asked for."""
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    rng = np.random.default_rng(0)
    backend = random_backend(CONFIG, "int8", 0, device)
    results = [
        {"operation": f"accumulators, {tokens} tokens", "ok": _accumulators(backend, rng, tokens)}
        for tokens in (3, 130)
    ]
    results += _paths_agree(backend, rng, "")
    trees = random_backend(UNION, "int8", 0, device)
    results.append({"operation": "paths through trees", "ok": _walks(trees, rng)})
    return backend.isa, results + _paths_agree(trees, rng, ", trees")


def _paths_agree(backend: CudaBackend, rng: np.random.Generator, what: str) -> list[dict[str, Any]]:
    ids = rng.integers(0, backend.config.vocab_size, 150).astype(np.int32)
    whole = backend.step([backend.new_state()], [ids], "all")
    state = backend.new_state()
    rows = [backend.step([state], [ids[t : t + 1]], "last")[0] for t in range(8)]
    states = [backend.new_state() for _ in range(3)]
    batch = backend.step(states, [ids[:1]] * 3, "last")
    tests = {
        "finite logits": bool(np.isfinite(whole).all()),
        "decode equals prefill": np.array_equal(rows, whole[:8]),
        "batch equals alone": all(np.array_equal(row, whole[0]) for row in batch),
    }
    return [{"operation": name + what, "ok": ok} for name, ok in tests.items()]


def _ternary(backend: CudaBackend, name: str, columns: int) -> np.ndarray:
    """int64 [..., columns] of packed rows on the device."""
    packed = backend.weights.slot(f"{name}.packed").cpu().numpy()
    codes = (packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.int64)
    ternary: np.ndarray = (
        codes.reshape(*packed.shape[:-1], 4 * device_row_bytes(columns))[..., :columns] - 1
    )
    return ternary


def _walks(backend: CudaBackend, rng: np.random.Generator) -> bool:
    same = True
    for channel, trees in backend.plan.model.trees().items():
        name, sizes = f"{channel}.rows", (trees.trees, trees.depth)
        t_V2D = _ternary(backend, name, trees.size)
        q_TD = rng.integers(-128, 128, (5, trees.size)).astype(np.int8)
        rows_TA, acc_TA = backend.walk(name, q_TD)
        expected_TV = q_TD.astype(np.int64) @ t_V2D[:, 0].T
        acc_TAL, rows_TAL = walk(partial(np.take_along_axis, expected_TV, axis=1), 5, *sizes)
        same &= np.array_equal(rows_TA, rows_TAL.reshape(5, -1))
        same &= np.array_equal(acc_TA, acc_TAL.reshape(5, -1))
        q_TA = rng.integers(-128, 128, rows_TA.shape).astype(np.int8)
        expected_TD = np.einsum("ta,tad->td", q_TA.astype(np.int64), t_V2D[rows_TA, 1])
        same &= np.array_equal(backend.combine(name, q_TA, rows_TA), expected_TD)
    return bool(same)


def _accumulators(backend: CudaBackend, rng: np.random.Generator, tokens: int) -> bool:
    for name, linear in architecture_of(CONFIG).linears().items():
        q_TK = rng.integers(-128, 128, (tokens, linear.inputs)).astype(np.int8)
        expected = q_TK.astype(np.int64) @ _ternary(backend, name, linear.inputs).T
        if not np.array_equal(backend.accumulate(name, q_TK), expected):
            return False
    return True
