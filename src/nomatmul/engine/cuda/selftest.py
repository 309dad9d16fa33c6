"""The self-test of `nomatmul doctor`: each path of the GPU engine on a small random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nomatmul.engine.cuda.opening import open_random
from nomatmul.engine.cuda.weights import device_row_bytes
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.names import linear_shapes

# No size is a multiple of a tile.
CONFIG = ModelConfig(vocab_size=307, hidden_size=200, num_layers=2, intermediate_size=333)


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


def run_self_test(device: Any = None) -> tuple[str, list[dict[str, Any]]]:
    """Return (the path that decodes, [{"operation", "ok"}]); equality is asked for."""
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    backend = open_random(CONFIG, "int8", 0, device)
    rng = np.random.default_rng(0)
    results = [
        {"operation": f"accumulators, {tokens} tokens", "ok": _accumulators(backend, rng, tokens)}
        for tokens in (3, 130)
    ]
    ids = rng.integers(0, CONFIG.vocab_size, 150).astype(np.int32)
    whole = backend.step([backend.new_state()], [ids], "all")
    results.append({"operation": "finite logits", "ok": bool(np.isfinite(whole).all())})
    state = backend.new_state()
    rows = [backend.step([state], [ids[t : t + 1]], "last")[0] for t in range(8)]
    results.append({"operation": "decode equals prefill", "ok": np.array_equal(rows, whole[:8])})
    states = [backend.new_state() for _ in range(3)]
    batch = backend.step(states, [ids[:1]] * 3, "last")
    same = all(np.array_equal(row, whole[0]) for row in batch)
    results.append({"operation": "batch equals alone", "ok": same})
    return backend.isa, results


def _accumulators(backend: Any, rng: np.random.Generator, tokens: int) -> bool:
    for name, (_, columns) in linear_shapes(CONFIG).items():
        q_TK = rng.integers(-128, 128, (tokens, columns)).astype(np.int8)
        packed = backend.weights.slot(f"{name}.packed").cpu().numpy()
        shifts = np.array([0, 2, 4, 6], np.uint8)
        codes = (packed[..., None] >> shifts & 3).reshape(
            len(packed), 4 * device_row_bytes(columns)
        )
        expected = q_TK.astype(np.int64) @ (codes[:, :columns].astype(np.int64) - 1).T
        if not np.array_equal(backend.accumulate(name, q_TK), expected):
            return False
    return True
