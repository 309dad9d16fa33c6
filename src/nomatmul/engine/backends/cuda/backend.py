"""The engine's backend on a GPU: sessions' states on the device, steps of any shape.

Legend: S sequences, T tokens, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nomatmul.engine.backends.cuda.decoder import Decoder
from nomatmul.engine.backends.cuda.device import INTERPRETED, CudaDevice, describe
from nomatmul.engine.backends.cuda.forward import Forward
from nomatmul.engine.backends.cuda.graphs import Graph, PromptGraph
from nomatmul.engine.backends.cuda.launch import UNPACK_TOKENS, Stretches
from nomatmul.engine.backends.cuda.nvrtc import CompileError
from nomatmul.engine.backends.cuda.probes import Probes
from nomatmul.engine.state import Layout, State
from nomatmul.formats import capability

if TYPE_CHECKING:
    from nomatmul.engine.backend import Ids, Want
    from nomatmul.engine.backends.cuda.weights import DeviceWeights
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig

# Rows of logits that exist at once.
HEAD_ROWS = 256
LOST = 2  # what decode.cu sets the flag to when its blocks wait in vain
MAX_GRAPH = 64  # sequences that decode through a captured graph


class DeviceState(State):
    """The state of one sequence: float32 [L, D] in device memory."""

    def __init__(self, backend: CudaBackend, h_LD: Tensor | None = None, position: int = 0) -> None:
        super().__init__(backend.layout, position)
        self._backend = backend
        with backend.alone():
            if h_LD is None:
                h_LD = torch.zeros(backend.shape, dtype=torch.float32, device=backend.device)
            self.h_LD = h_LD.to(backend.device)

    def fork(self) -> DeviceState:
        with self._backend.alone():
            return DeviceState(self._backend, self.h_LD.clone(), self.position)

    def arrays(self) -> dict[str, Float]:
        with self._backend.alone():
            # a copy, though the device of the interpreter is the host itself
            return self.layout.views(self.h_LD.cpu().numpy().copy())


class CudaBackend(Probes):
    """One model on one GPU; safe to call from several threads (steps run one after another)."""

    name = "cuda"
    threads = 1

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.config = config
        self.plan = weights.plan
        self.weights = weights
        self.device = weights.device
        self.forward = Forward(weights)
        self.chunk = self.plan.chunk_tokens
        self.isa = "triton (interpreted)" if INTERPRETED else "triton, CUDA graph"
        self.layout = Layout.of(self.plan.model)
        self.shape = self.layout.fixed_shape
        self.gpu = CudaDevice(self.device, weights.nbytes)
        self._lock = threading.RLock()
        self._graphs: dict[int, Graph] = {}
        self._prompt_graph: tuple[int, PromptGraph] | None = None  # one: it keeps its work space
        self._no_graphs = os.environ.get("NOMATMUL_PROMPT_GRAPHS") == "0"
        self._last_block = 0  # tokens of the last block that a graph could have served
        self._spare: Tensor | None = None
        self.decoder = self._decoder()
        if self.decoder is not None:
            self.isa = "cuda, persistent kernel"

    def _decoder(self) -> Decoder | None:
        """The persistent kernel, or None where it cannot run; NOMATMUL_DECODE=triton forces that.

        A chip that should have it and cannot compile it is worth a warning: decoding is slower.
        """
        choice = os.environ.get("NOMATMUL_DECODE", "")
        if choice not in ("", "persistent", "triton"):
            raise ValueError(f"NOMATMUL_DECODE={choice!r} is not known: use persistent or triton")
        if not capability.runs(self.config, "persistent"):
            if choice == "persistent":
                capability.check(self.config, "persistent")
            return None
        if self.device.type != "cuda" or choice == "triton":
            return None
        if torch.cuda.get_device_capability(self.device) < (8, 0) and choice == "":
            return None
        try:
            with self._on_device():
                decoder = Decoder(self.weights, self.forward.flag)
                self._prove(decoder)
        except CompileError as error:
            if choice == "persistent":
                raise ValueError(f"the persistent kernel cannot be used: {error}") from None
            warnings.warn(
                f"decoding runs the slower triton kernels: {error}", RuntimeWarning, stacklevel=2
            )
            return None
        return decoder

    def _prove(self, decoder: Decoder) -> None:
        """Compare a first token with the general path, once for each compiled kernel and machine.

        Raises CompileError when they differ: then the kernel is not to be used here.
        """
        before, after = torch.zeros((2, *self.shape), device=self.device)
        decoder.launch(0, before, after)
        logits_V = decoder.fetch()
        flag = int(self.forward.flag.item())
        self.forward.flag.zero_()
        if flag == LOST:
            raise CompileError("its blocks do not reach each other")
        if decoder.proof.exists() or flag:  # a damaged model is reported when it is asked
            return
        with torch.inference_mode():
            rows = list(self._run(before[None], [np.zeros(1, np.int32)], "last"))
        if not np.array_equal(rows[0][0], logits_V) or not torch.equal(before, after):
            raise CompileError("its first token differs from the general path's")
        with contextlib.suppress(OSError):
            decoder.proof.parent.mkdir(parents=True, exist_ok=True)
            decoder.proof.touch()

    def new_state(self) -> DeviceState:
        return DeviceState(self)

    def load_state(self, arrays: Mapping[str, Float], position: int) -> DeviceState:
        return DeviceState(self, torch.from_numpy(self.layout.gathered(arrays)), position)

    def step(self, states: Sequence[DeviceState], ids_T: Sequence[Ids], want: Want) -> Float:
        """See CausalBackend. Raises ValueError where the GPU has too little memory for so many
        tokens."""
        with self.alone(), torch.inference_mode():
            logits = self._step(states, ids_T, want)
            for state, ids in zip(states, ids_T, strict=True):
                state.position += len(ids)
        return logits

    def _step(self, states: Sequence[DeviceState], ids_T: Sequence[Ids], want: Want) -> Float:
        single = all(len(ids) == 1 for ids in ids_T)
        if single and len(states) == 1 and self.decoder is not None:
            return self._decode_one(self.decoder, states[0], int(ids_T[0][0]), want)
        if single and len(states) <= MAX_GRAPH and self.device.type == "cuda":
            return self._decode(states, ids_T, want)
        work_SLD = torch.stack([state.h_LD for state in states])
        rows = list(self._run(work_SLD, ids_T, want))
        self._check_finite()
        for state, h_LD in zip(states, work_SLD, strict=True):
            state.h_LD.copy_(h_LD)
        if not rows:
            return np.zeros((0, self.plan.vocabulary), np.float32)
        return np.concatenate(rows)

    def _run(self, work_SLD: Tensor, ids_T: Sequence[Ids], want: Want) -> Iterator[Float]:
        """Blocks of at most `chunk` tokens, in the order of the sequences."""
        lengths = [len(ids) for ids in ids_T]
        ends = np.cumsum(lengths)
        flat = np.concatenate(ids_T)
        scratch = None
        pieces = -(-len(flat) // self.chunk)
        chunk = min(self.chunk, -(-len(flat) // (16 * pieces)) * 16)  # of even size
        captured_tokens = chunk if pieces > 1 else -(-len(flat) // 128) * 128
        for start in range(0, len(flat), chunk):
            end = min(start + chunk, len(flat))
            low = int(np.searchsorted(ends, start, side="right"))
            high = int(np.searchsorted(ends, end, side="left"))
            sequences = np.arange(low, high + 1, dtype=np.int32)
            inner = [int(e) - start for e in ends[low:high]]
            starts = np.array([0, *inner, end - start], dtype=np.int32)
            longest = int(np.diff(starts).max())
            stretches = Stretches(self._put(sequences), self._put(starts), longest)
            ids = self._put(flat[start:end])
            alone = low == high and len(ids) >= UNPACK_TOKENS
            graph = self._captured(captured_tokens) if alone else None
            if graph is not None:
                x_TD = graph.replay(ids, work_SLD[low])
            else:
                scratch = self._scratch(len(flat)) if scratch is None else scratch
                x_TD = self.forward.embed(ids)
                x_TD = self.forward.blocks(x_TD, work_SLD, stretches, scratch)
            if want == "all":
                for at in range(0, end - start, HEAD_ROWS):
                    yield self.forward.head(x_TD[at : at + HEAD_ROWS]).cpu().numpy()
            elif want == "last":
                done = np.array([e - start - 1 for e in ends if start < e <= end], dtype=np.int64)
                if len(done):
                    rows = x_TD.index_select(0, self._put(done))
                    yield self.forward.head(rows).cpu().numpy()

    def _captured(self, tokens: int) -> PromptGraph | None:
        """The captured step of a block of one sequence, from the second of its size in a row on.

        Hundreds of launches take the host longer than the GPU takes for them; but to capture them
        takes as long as several blocks, too long for lengths that come once.
        """
        if self.device.type != "cuda" or self._no_graphs:
            return None
        before, self._last_block = self._last_block, tokens
        if self._prompt_graph is not None and self._prompt_graph[0] == tokens:
            return self._prompt_graph[1]
        if tokens != before:
            return None
        self._prompt_graph = None  # its memory serves the next one
        try:
            graph = PromptGraph(self.forward, self.shape, tokens, self._scratch(tokens))
        except (RuntimeError, ValueError) as error:
            self._no_graphs = True
            warnings.warn(
                f"prompts are launched kernel by kernel: {describe(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._prompt_graph = tokens, graph
        return graph

    def _decode_one(self, decoder: Decoder, state: DeviceState, token: int, want: Want) -> Float:
        """One token of one sequence; the new state is kept only if the step succeeded."""
        if self._spare is None:
            self._spare = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        decoder.launch(token, state.h_LD, self._spare)
        logits_V = decoder.fetch() if want != "none" else None
        self._check_finite()
        state.h_LD, self._spare = self._spare, state.h_LD
        if logits_V is None:
            return np.zeros((0, self.plan.vocabulary), np.float32)
        return logits_V[None]

    def _decode(self, states: Sequence[DeviceState], ids_T: Sequence[Ids], want: Want) -> Float:
        """One token of each sequence, through a captured graph."""
        count = len(states)
        if count not in self._graphs:
            self._graphs[count] = Graph(self.forward, self.shape, count)
        graph = self._graphs[count]
        torch.stack([state.h_LD for state in states], out=graph.states_SLD)
        graph.ids_S.copy_(torch.from_numpy(np.concatenate(ids_T)))
        graph.graph.replay()
        logits_SV = graph.logits_SV.cpu().numpy() if want != "none" else None
        self._check_finite()
        for state, h_LD in zip(states, graph.states_SLD, strict=True):
            state.h_LD.copy_(h_LD)
        if logits_SV is None:
            return np.zeros((0, self.plan.vocabulary), np.float32)
        return logits_SV

    def weight_bytes(self) -> dict[str, int]:
        return self.weights.footprint()

    def unvisited_bytes(self) -> int:
        return self.weights.unvisited_bytes()

    def scratch_bytes(self) -> int:
        """See Backend: what was in use beyond the weights."""
        return max(0, self.gpu.peak_bytes() - self.weights.nbytes)

    def with_threads(self, threads: int) -> CudaBackend:
        raise ValueError("threads are about the CPU, this model is on a GPU")

    def _check_finite(self) -> None:
        flag = self.forward.flag
        value = int(flag.item())
        if value:
            flag.zero_()
            if value == LOST:
                if self.decoder is not None:
                    self.decoder.forget()
                raise RuntimeError("the blocks of the persistent kernel lost each other")
            raise ValueError("the activations are not finite (NaN or infinity)")

    def _scratch(self, tokens: int) -> Tensor | None:
        """int8 for the largest unpacked matrix, None where too few tokens share it."""
        if min(tokens, self.chunk) < UNPACK_TOKENS or self.device.type != "cuda":
            return None
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            return None
        return torch.empty(self.plan.scratch_bytes, dtype=torch.int8, device=self.device)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One thread at a time works on the device, nobody while a graph is captured."""
        with self._lock, self._on_device():
            try:
                yield
            except torch.OutOfMemoryError as error:
                message = f"{self.device} ran out of memory: {describe(error)}"
                raise ValueError(message) from None

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()
