"""What `same_bits.py` compares, computed by the package that is on the path. A library.

Arguments: folder for one .npy a name, folder with texts, device, groups. It uses names of the
package only that old trees have, too.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
BOX = ROOT / "src" / "nomatmul" / "box"  # the same weights for both trees
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 96, "num_layers": 3, "intermediate_size": 200,
}  # fmt: skip
ATTENTION: dict[str, Any] = {"token_mixer": "attention", "linear": "dense", "num_heads": 4}
TREES: dict[str, Any] = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 3}
DECODERS: dict[str, dict[str, Any]] = {
    "matmul-free": {},
    "no-channel": {"channel_mixer": "none", "use_lower_bound": False},
    "union": {**TREES, "activation": "silu"},
    "dense-mlgru": {"linear": "dense", "channel_mixer": "ffn"},
    "transformer": {**ATTENTION, "tie_embeddings": True},
    "ternary-attention": {**ATTENTION, "linear": "ternary", "channel_mixer": "ffn"},
    "trees": {
        **ATTENTION, **TREES, "norm": "layer", "embedding_norm": True, "fff_bias": True,
        "fff_master_width": 8, "fff_layers": [1],
    },
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "ultrafastbert": {**TREES, "fff_bias": True},
    "ternary-trees": {**TREES, "linear": "ternary", "norm": "rms", "activation": "silu"},
    "glu-rotary": {"channel_mixer": "glu", "positions": "rotary", "embedding_norm": False},
}


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    out, data, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    groups: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]]
    groups = {"torch": torch_models, "train": training, "engine": engine}
    failed = False
    for name in sys.argv[4:] or groups:
        try:
            for what, array in groups[name](data if name != "train" else out, device):
                np.save(out / f"{name} {what}.npy", np.asarray(array))
        except Exception:  # the other groups are compared all the same; the exit status says it
            failed = True
            traceback.print_exc()
    sys.exit(int(failed))


def torch_models(_: Path, device: str) -> Iterator[tuple[str, Any]]:
    import torch

    from nomatmul.models import CausalLM, CausalLMConfig, EncoderConfig, MaskedLM

    ids = torch.randint(3, 300, (2, 33), generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.where(ids % 5 == 0, ids, -100)
    kinds = [(CausalLM, CausalLMConfig, DECODERS), (MaskedLM, EncoderConfig, ENCODERS)]
    for kind, config, dials in kinds:
        for name, values in dials.items():
            for mode in ("none", "mlp", "block")[: 3 if name in ("matmul-free", "union") else 1]:
                for bf16 in (False, True) if device == "cuda" else (False,):
                    torch.manual_seed(1)
                    model = kind(config(**{**SIZES, "num_heads": 4, **values}))
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(torch.randn_like(parameter) * 0.05)
                    model = model.to(device).train()
                    model.set_recompute(mode)
                    cast = torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext()
                    with cast:
                        found = model(ids, labels=ids if kind is CausalLM else labels)
                    found.loss.backward()
                    what = f"{name} {mode} {'bf16' if bf16 else 'float32'}"
                    with torch.no_grad(), cast:  # a fused loss makes no logits
                        logits = model(ids).logits
                    yield f"{what} loss", found.loss.detach().cpu()
                    yield f"{what} logits", logits.float().cpu()
                    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                    yield f"{what} gradients", torch.cat(grads).cpu()


def training(out: Path, device: str) -> Iterator[tuple[str, Any]]:
    from nomatmul.train import apply_overrides, recipe, run

    texts = out.parent
    short = ["steps=12", "log_interval=1", "valid_interval=6", "sample_tokens=0", "seed=3"]
    for name in ("cpu_minute", "transformer_cpu_minute", "union_cpu_minute", "encoder_cpu_minute"):
        config = recipe(name)
        fields = vars(config) if hasattr(config, "__dict__") else config.__dataclass_fields__
        config = apply_overrides(config, [s for s in short if s.split("=")[0] in fields])
        run(config, [str(texts / "train.txt.bz2")], out / name, device=device, quiet=True,
            valid=[str(texts / "valid.txt.bz2")])  # fmt: skip
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
        yield f"{name} losses", [row["loss"] for row in rows if "loss" in row]
        yield f"{name} held-out", [row["valid_loss"] for row in rows if "valid_loss" in row]
    from nomatmul.finetune import FinetuneConfig, find_task, finetune

    table = out / "labels.tsv"
    rows = [f"the old lamp {n % 7} near river {n % 3}\t{'yes' if n % 3 else 'no'}"
            for n in range(120)]  # fmt: skip
    table.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    settings = FinetuneConfig(seeds=1, epochs=1)
    finetune(out / "encoder_cpu_minute", find_task(str(table)), str(table), out / "tuned", settings,
             device=device)  # fmt: skip
    found = json.loads(next((out / "tuned").rglob("seed-0.json")).read_text())
    yield "finetune", [v for v in _numbers(found) if v == v]


def _numbers(value: Any, key: str = "") -> Iterator[float]:
    if isinstance(value, dict):
        for name in sorted(value):
            if "second" not in name and "time" not in name:
                yield from _numbers(value[name], name)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def engine(_: Path, device: str) -> Iterator[tuple[str, Any]]:
    import nomatmul

    traces = GOLDEN / "traces"
    for name, path in {"decoder v1": traces / "packed-decoder-v1", "box": BOX}.items():
        lm: Any = nomatmul.load(path, device=device)
        ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, 70)
        session = lm.session()
        yield f"{name} prompt", session.append(ids[:50])
        yield f"{name} tokens", np.stack([session.append(ids[n : n + 1]) for n in range(50, 70)])
        yield f"{name} generated", lm.generate_ids(ids[:9], max_tokens=24, seed=5, temperature=0.9)
    if device == "cpu":
        encoder: Any = nomatmul.load(traces / "packed-encoder-v1", device=device)
        ids = np.random.default_rng(1).integers(3, encoder.config.vocab_size, (3, 17))
        yield "encoder v1 hidden", encoder.hidden(ids)
