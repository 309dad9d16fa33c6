"""Speed and memory of the engine, measured the way the benchmark tables state them.

Run as a module it measures in a process of its own, so that the peak memory is that of one model:
`python -m nomatmul.evaluate.speed JSON` takes the fields of `SpeedRequest` and prints a list of
`SpeedResult`s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nomatmul.train import children

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel

# The published sizes of MatMul-free LM (arXiv 2406.02528).
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "num_layers": layers,
        "intermediate_size": intermediate,
    }
    for name, hidden, layers, intermediate in (
        ("370M", 1024, 24, 2816),
        ("1.3B", 2048, 24, 5632),
        ("2.7B", 2560, 32, 6912),
    )
}
# 370M with trees of as many parameters in place of its GLU: 680 of 4216 rows active.
SIZES["union-370M"] = {
    **SIZES["370M"], "channel_mixer": "fff", "activation": "silu", "fff_trees": 136, "fff_depth": 4,
}  # fmt: skip
_TRANSFORMER: dict[str, Any] = {
    "token_mixer": "attention", "tie_embeddings": True, "max_position_embeddings": 4096,
    "rounding": "even",
}  # fmt: skip
_QWEN3 = {
    **_TRANSFORMER, "vocab_size": 151_936, "head_dim": 128, "num_kv_heads": 8, "qk_norm": True,
    "linear_norm": "none", "scale_group": 128, "embedding_linear": "ternary",
    "rope_theta": 1e6, "split_gate": True,
}  # fmt: skip
# Ternary transformers that people run: BitNet b1.58-2B-4T, and Ternary-Bonsai's shapes.
SIZES |= {
    "BitNet-2B-4T": {
        **_TRANSFORMER, "vocab_size": 128_256, "hidden_size": 2560, "num_layers": 30,
        "intermediate_size": 6912, "num_heads": 20, "num_kv_heads": 5, "glu_activation": "relu2",
        "linear_norm": "sub", "split_gate": True, "head_linear": "dense", "rope_theta": 5e5,
        "norm_eps": 1e-5, "linear_norm_eps": 1e-5,
    },
    "Qwen3-1.7B": {
        **_QWEN3, "hidden_size": 2048, "num_layers": 28, "intermediate_size": 6144,
        "num_heads": 16,
    },
    "Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "num_layers": 36, "intermediate_size": 12_288,
        "num_heads": 32, "tie_embeddings": False,
    },
}  # fmt: skip
_WARM_STEPS = 3


@dataclass(frozen=True)
class SpeedRequest:
    """What to measure. size: a name of SIZES (random weights) or a packed directory."""

    size: str
    threads: tuple[int, ...]
    packing: str = "2bit"
    embedding: str = "int8"
    isa: str | None = None
    steps: int = 32
    prefill: int = 512
    batches: tuple[int, ...] = (16,)
    bandwidth_gib: float = 1.0
    device: str = "cpu"
    kv: str = "f16"


@dataclass(frozen=True)
class SpeedResult:
    """One model at one number of threads.

    Rates are tokens a second (of all sequences for `batch_tokens_per_second`, by batch size), the
    median of many steps. `peak_resident_bytes` is of the whole process after loading and decoding,
    Python included; `peak_with_prefill_bytes` at its end. `fraction_of_bandwidth_limit` is bytes
    that a decoded token reads, times tokens a second, over the read bandwidth of the same run.
    """

    size: str
    packing: str
    embedding: str
    isa: str
    threads: int
    decode_tokens_per_second: float
    prefill_tokens: int
    prefill_tokens_per_second: float
    batch_tokens_per_second: dict[int, float]
    peak_resident_bytes: int
    peak_with_prefill_bytes: int
    read_bandwidth_bytes_per_second: float
    bytes_read_per_token: int
    fraction_of_bandwidth_limit: float
    device_name: str = ""  # of a GPU, whose memory the peaks then are of


def measure_in_subprocess(request: SpeedRequest) -> list[SpeedResult]:
    """`measure` in a fresh process. Raises ValueError with that process's own words."""
    words = children.command(__name__, json.dumps(dataclasses.asdict(request)))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ValueError(f"measuring {request.size} was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"measuring {request.size} failed: {lines[-1]}")
    results = []
    for values in json.loads(done.stdout):
        batches = values.pop("batch_tokens_per_second")
        rates = {int(size): rate for size, rate in batches.items()}
        results.append(SpeedResult(**values, batch_tokens_per_second=rates))
    return results


def measure(request: SpeedRequest) -> list[SpeedResult]:
    """Measure one model in this process, at each number of threads in turn.

    Raises ValueError for a size, a packing or an instruction set that does not exist here.
    """
    from nomatmul.engine.report import memory_of_process

    if request.device != "cpu":
        return [_measure_on_device(request)]
    lm = open_model(request)
    models = [lm.with_threads(threads) for threads in request.threads]
    for model in models:  # nothing but the model has used memory so far
        step_seconds(model, 4)
    peak = memory_of_process()[1]
    decoding = [_decoding(model, request) for model in models]
    _forget_peak()  # the buffer of the bandwidth's measurement was part of it
    results = []
    for model, values in zip(models, decoding, strict=True):
        seconds = prefill_seconds(model, request.prefill)
        rates = batch_rates(model, request.batches, values["decode_tokens_per_second"])
        results.append(
            SpeedResult(
                **values,
                size=request.size,
                packing=lm.packing,
                embedding=lm.embedding_form,
                isa=model.backend.isa,
                threads=model.backend.threads,
                prefill_tokens=request.prefill,
                prefill_tokens_per_second=request.prefill / seconds,
                batch_tokens_per_second=rates,
                peak_resident_bytes=peak,
                peak_with_prefill_bytes=memory_of_process()[1],
            )
        )
    return results


def _measure_on_device(request: SpeedRequest) -> SpeedResult:
    """As `measure`, on a GPU: steps include what the host does, memory is the device's."""
    lm = open_model(request)
    backend, gpu = lm.backend, lm.backend.gpu
    assert gpu is not None
    rate = 1 / median(step_seconds(lm, max(request.steps, 32)))
    peak = gpu.peak_bytes()
    prefill_seconds(lm, request.prefill)  # kernels are compiled, then captured in a graph
    seconds = prefill_seconds(lm, request.prefill)
    rates = batch_rates(lm, request.batches, rate)
    read, bandwidth = bytes_read_per_token(lm), gpu.copy_bandwidth()
    return SpeedResult(
        size=request.size,
        packing=lm.packing,
        embedding=lm.embedding_form,
        isa=backend.isa,
        threads=1,
        decode_tokens_per_second=rate,
        prefill_tokens=request.prefill,
        prefill_tokens_per_second=request.prefill / seconds,
        batch_tokens_per_second=rates,
        peak_resident_bytes=peak,
        peak_with_prefill_bytes=gpu.peak_bytes(),
        read_bandwidth_bytes_per_second=bandwidth,
        bytes_read_per_token=read,
        fraction_of_bandwidth_limit=rate * read / bandwidth,
        device_name=gpu.name(),
    )


def _decoding(model: LanguageModel, request: SpeedRequest) -> dict[str, Any]:
    """Decode rate between two measurements of the bandwidth, of which the better one counts."""
    from nomatmul.engine.report import read_bandwidth

    threads = model.backend.threads
    bandwidth = read_bandwidth(request.bandwidth_gib, threads)
    rate = 1 / median(step_seconds(model, request.steps))
    bandwidth = 1e9 * max(bandwidth, read_bandwidth(request.bandwidth_gib, threads))
    read = bytes_read_per_token(model)
    return {
        "decode_tokens_per_second": rate,
        "read_bandwidth_bytes_per_second": bandwidth,
        "bytes_read_per_token": read,
        "fraction_of_bandwidth_limit": rate * read / bandwidth,
    }


def open_model(request: SpeedRequest) -> LanguageModel:
    """The model of a request: random weights of a named size, or a packed directory."""
    from nomatmul.engine import load, random_model
    from nomatmul.formats.config import ModelConfig

    options: dict[str, Any] = {"isa": request.isa, "device": request.device, "kv": request.kv}
    if request.size in SIZES:
        config = ModelConfig(**SIZES[request.size])
        return random_model(config, request.packing, request.embedding, **options)
    if not Path(request.size).exists():
        raise ValueError(f"{request.size} is no size ({', '.join(SIZES)}) and no packed directory")
    return load(request.size, kind="language", **options)


def bytes_read_per_token(lm: LanguageModel) -> int:
    """Bytes of weights that decoding one token reads: all but the embedding's other rows, and the
    rows of trees that it does not visit."""
    parts = lm.footprint()
    embedding = parts["embedding"]
    read = parts["weights"] - embedding - lm.backend.unvisited_bytes()
    if "head" not in parts and lm.config.tie_embeddings:  # the embedding serves
        return read + embedding
    return read + embedding // lm.config.vocab_size


def step_seconds(lm: LanguageModel, steps: int, sequences: int = 1) -> list[float]:
    """Seconds of each of `steps` steps that feed one token to each of so many sequences."""
    sessions = [lm.session() for _ in range(sequences)]
    size = lm.config.vocab_size
    times = []
    for step in range(steps + _WARM_STEPS):
        ids = [[(7919 * step + 104729 * number) % size] for number in range(sequences)]
        start = time.perf_counter()
        lm.step(sessions, ids)
        times.append(time.perf_counter() - start)
    return times[_WARM_STEPS:]


def batch_rates(lm: LanguageModel, sizes: Sequence[int], single: float) -> dict[int, float]:
    """Tokens a second of all sequences, by batch size; of one it is what was measured already."""
    return {n: n / median(step_seconds(lm, 8, n)) if n > 1 else single for n in sizes}


def prefill_seconds(lm: LanguageModel, tokens: int, turns: int = 3) -> float:
    """Seconds that a prompt of so many tokens takes, the median of several turns."""
    ids = [(7919 * number) % lm.config.vocab_size for number in range(tokens)]
    lm.session().append(ids[: min(tokens, 64)])
    times = []
    for _ in range(turns):
        session = lm.session()
        start = time.perf_counter()
        session.append(ids)
        times.append(time.perf_counter() - start)
    return median(times)


def _forget_peak() -> None:
    """Let VmHWM start again from the present size (Linux; elsewhere the old peak stays)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    """The child's side of `measure_in_subprocess`."""
    try:
        values: dict[str, Any] = json.loads(sys.argv[1])
        for name in ("threads", "batches"):
            values[name] = tuple(values[name])
        request = SpeedRequest(**values)
        print(json.dumps([dataclasses.asdict(result) for result in measure(request)]))
    except (ValueError, MemoryError, OSError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
