"""The persistent kernel of decode.cu: one token of one sequence a launch.

Legend: L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nomatmul.engine.backends.cuda.nvrtc import CompileError, Kernel, cache_file, compile_cubin
from nomatmul.engine.backends.cuda.plan import Plan, device_row_bytes

if TYPE_CHECKING:
    from nomatmul.engine.backends.cuda.weights import DeviceWeights

MOST_THREADS = 352  # of a block that compute, but for rows
EACH = {640: 2}  # groups of a vector: groups a thread, where the rule was measured to miss the best
SETS = 3  # of words that blocks wait for; layers take turns
ABSENT = -1  # the bits of a word that is not there yet
EMBEDDINGS = {torch.bfloat16: 0, torch.int8: 1, torch.float32: 2}
_POINTERS = (
    *("embedding", "embedding_scale", "ifg", "o", "gate", "down", "head", "mixer_norm"),
    *("ifg_norm", "g_norm", "o_norm", "bound", "channel_norm", "gate_norm", "down_norm"),
    *("final_norm", "head_norm", "w_scale", "state_in", "state_out", "logits", "token_in"),
    *("token_out", "items", "best", "arrived", "flag"),
)


class Params(ctypes.Structure):
    """The struct of decode.cu, member by member."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("set", ctypes.c_int32),
        ("token", ctypes.c_int32),
    )


def defines(
    plan: Plan, embedding: int, blocks: int, threads: int = 256, shared: int = 232448
) -> dict[str, str]:
    """Macros of decode.cu for a model on so many blocks of threads with `shared` bytes each."""
    least = min(plan.norm_eps, plan.linear_eps, plan.gate_eps)
    return {
        **plan.macros(),
        "V": str(plan.vocabulary),
        "L": str(plan.layers),
        "RBD": str(device_row_bytes(plan.size)),
        "RBM": str(device_row_bytes(plan.inner) if plan.inner else 64),
        "BLOCKS": str(blocks),
        "EMBEDDING": str(embedding),
        "THREADS": str(threads),
        "SHARED_LIMIT": str(shared),
        "LEAST_EPS": f"{least!r}f",
    }


def best_blocks(plan: Plan, processors: int) -> int:
    """How many blocks share the rows most evenly: the fewest bytes for the busiest one."""
    size, inner = plan.size, plan.inner

    def busiest(blocks: int) -> int:
        rows, wide = -(-size // blocks), -(-inner // blocks)
        return 4 * rows * size + 2 * wide * size + rows * inner

    return min(range(1, processors + 1), key=lambda blocks: (busiest(blocks), blocks))


def best_threads(plan: Plan, blocks: int) -> int:
    """Threads of a block that compute, by what measured best on an H200.

    One group of four elements each where 256 threads can have them all, else three or, in the
    widest models, more. Fewer warps repeat less of what every warp does. 2.7B's 640 groups are
    12 % faster with two.
    """
    rows = -(-max(plan.size, plan.inner) // blocks)
    groups = -(-plan.size // 16) * 4
    each = EACH.get(groups, 1 if groups <= 256 else max(3, -(-groups // MOST_THREADS)))
    return -(-max(-(-groups // each), rows) // 32) * 32


class Decoder:
    """Launches decode.cu. Raises CompileError where it cannot be compiled or started."""

    def __init__(
        self, weights: DeviceWeights, flag: Tensor, emulated: tuple[Any, int, int] | None = None
    ) -> None:
        plan, device = weights.plan, weights.device
        self.kernel: Any
        if emulated is not None:  # tests: a kernel on the CPU, its blocks and threads
            self.kernel, self.blocks, self.threads = emulated
        else:
            self._compile(weights)
        self.plan = plan
        self._set = 0
        self._keep: dict[str, Tensor] = dict(weights.stack)
        for name, tensor in weights.stack.items():
            if name.endswith("_norm"):
                size = plan.inner if name == "down_norm" else plan.size
                self._keep[name] = _in_order(tensor, size)
        self._keep["w_scale"] = _w_scales(weights)
        self._keep["items"] = _items(plan.size, plan.inner, device)
        # logits, the likeliest token: one piece, so one copy brings both to the host
        self.out = torch.zeros(plan.vocabulary + 1, dtype=torch.int32, device=device)
        self.logits_V = self.out[:-1].view(torch.float32)
        self.host = torch.zeros_like(self.out, device="cpu")
        if device.type == "cuda":
            self.host = self.host.pin_memory()
        self._keep["logits"], self._keep["token_out"] = self.out, self.out[-1:]
        self._keep["best"] = torch.zeros(1, dtype=torch.int64, device=device)
        self._keep["arrived"] = torch.zeros(1, dtype=torch.int32, device=device)
        self._keep["flag"] = flag
        self.params = Params()
        for name in _POINTERS:
            if name in self._keep:
                setattr(self.params, name, self._keep[name].data_ptr())

    def _compile(self, weights: DeviceWeights) -> None:
        plan = weights.plan
        properties = torch.cuda.get_device_properties(weights.device)
        capability = (properties.major, properties.minor)
        if capability < (8, 0):
            raise CompileError("the persistent kernel needs compute capability 8.0")
        self.blocks = best_blocks(plan, properties.multi_processor_count)
        self.threads = best_threads(plan, self.blocks)
        form = EMBEDDINGS[weights.stack["embedding"].dtype]
        shared = getattr(properties, "shared_memory_per_block_optin", 101376)
        macros = defines(plan, form, self.blocks, self.threads, shared)
        cubin = compile_cubin("decode.cu", macros, capability)
        self.kernel = Kernel(cubin, "decode")
        self.proof = cache_file("decode", cubin, "proved")

    def launch(
        self, token: int | Tensor, before_LD: Tensor, after_LD: Tensor, made: Any = None
    ) -> None:
        """Queue one token: from the state `before` to `after`, logits into `logits_V`.

        token: a number, or an int32 tensor on the device that holds it by then. made: where the
        likeliest next token goes (default: behind the logits). Everything given must stay alive
        until the stream has passed.
        """
        params = self.params
        params.token = token if isinstance(token, int) else -1
        if isinstance(token, Tensor):
            params.token_in = token.data_ptr()
        params.token_out = (self._keep["token_out"] if made is None else made).data_ptr()
        params.state_in, params.state_out = before_LD.data_ptr(), after_LD.data_ptr()
        params.set = self._set
        self._set = (self._set + self.plan.layers) % SETS
        stream = 0
        if self.out.is_cuda:
            stream = torch.cuda.current_stream(self.out.device).cuda_stream
        self.kernel.launch((self.blocks, 1), self.threads + 32, [params], stream, cooperative=True)

    def forget(self) -> None:
        """Take back what a launch left that broke off: no word that blocks wait for is there."""
        items = self._keep["items"]
        items.copy_(_items(self.plan.size, self.plan.inner, items.device))

    def fetch(self) -> np.ndarray:
        """float32 [V] on the host: the logits of the last launch. Waits for it."""
        self.host.copy_(self.out, non_blocking=True)
        if self.out.is_cuda:
            torch.cuda.current_stream(self.out.device).synchronize()
        return self.host.numpy()[:-1].view(np.float32).copy()


def _places(size: int, device: torch.device) -> Tensor:
    """int64 [size padded to 16]: the element at each place, `size` and more where there is none.

    Place 16 w + 4 p + b holds element 16 w + 4 b + p: see decode_vector.cuh.
    """
    place = torch.arange(-(-size // 16) * 16, device=device)
    return place.view(-1, 4, 4).transpose(1, 2).flatten()


def _in_order(norms: Tensor, size: int) -> Tensor:
    """Norm weights [L, C * size] or [size] as decode.cu meets them: [L, C, padded], zeros last."""
    places = _places(size, norms.device)
    vectors = norms.reshape(norms.shape[0], -1, size)
    chosen = vectors[:, :, places.clamp(max=size - 1)]
    return torch.where(places < size, chosen, 0.0).contiguous()


def _items(size: int, inner: int, device: torch.device) -> Tensor:
    """int32 [SETS, words]: nothing is there yet, but for places of no element, which are zero."""
    vectors = [size] * 4 + ([inner] if inner else [])
    words = [torch.where(_places(n, device) < n, ABSENT, 0) for n in vectors]
    return torch.cat(words).to(torch.int32).repeat(SETS, 1)


def _w_scales(weights: DeviceWeights) -> Tensor:
    """float32 [6 L + 1]: scales of i, f, g, o, gate, down of each layer, then the head's."""
    names = [f"mixer.{letter}_proj" for letter in "ifgo"]
    names += ["channel.gate_proj", "channel.down_proj"]
    values = [
        weights.w_scale.get(f"layers.{layer}.{name}", 0.0)
        for layer in range(weights.plan.layers)
        for name in names
    ]
    values.append(weights.w_scale["head"])
    return torch.tensor(values, dtype=torch.float32, device=weights.device)
