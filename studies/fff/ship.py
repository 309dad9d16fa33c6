"""The small union model and its GLU twin: trained longest, squeezed to travel, made whole again.

    python studies/fff/ship.py expand ship-union.safetensors runs/union/model

`expand` writes the checkpoint directory that `nomatmul pack`, `eval` and transformers take. A
squeezed file holds ternary matrices at 1.6 bits a weight with their absmean scale, the embedding in
float16 and the rest in float32. Its ternary values and scales are those of the trained model (the
latent weights are not kept: training cannot go on from it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.dry_run import add_tiny, temporary
from benchmarks.gpu_common import python_path
from nomatmul.evaluate.rows import read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packing import pack_ternary, unpack_ternary
from nomatmul.formats.quantise import quantise_weight
from studies.compare.plan import Cell, missing
from studies.compare.summary import Entry, summarise
from studies.fff.plan import study_cell

NEAR = 0.02  # bits per byte: of variants this near the best one, the fewest active neurons win
SPEED = 400_000.0  # tokens a second, where no row says better
SHARE = 0.78  # of the time that is left, what the run is planned for; the rest is start and scoring
_FORM = "1.6bit"


def choose(entries: list[Entry], rows: int) -> str | None:
    """The union variant to ship: fewest active neurons within NEAR of the best one.

    Only trees of at most `rows` neurons, the GLU's size, take part: equal parameters.
    """
    trees = [e for e in entries if e.kind == "fff" and e.neurons <= rows and "every" not in e.label]
    if not trees:
        return None
    best = min(e.score for e in trees)
    return min((e for e in trees if e.score <= best + NEAR), key=lambda e: e.active).variant


def commands(args: argparse.Namespace) -> list[tuple[list[str], dict[str, str]]]:
    """The processes of both runs, one a GPU where there are two; [] where there is no time."""
    if "union" not in args.sections:
        return []
    rows = read_rows(args.out / "fff-study-rows.jsonl")
    entries = summarise(rows, "union")
    name = choose(entries, 2040 if not args.tiny else 60) or "fff-16x6"
    speeds = [e.tokens_per_second for e in entries if e.variant in (name, "dense")]
    left = args.began + args.seconds - time.time()
    amount = int(min(speeds, default=SPEED) * max(left - 20, 0) * SHARE)
    if args.tiny:
        amount = 4 * args.length * args.batch
    found = []
    for place, variant in enumerate((name, "dense")):
        keep = str((args.work / "ship").resolve())
        extra = {"tokens": amount, "stage": "ship", "keep": keep, "rate": args.ship_rate}
        cell = study_cell("union", variant, (1,), args, **extra)
        if (amount < 1e5 and not args.tiny) or not missing(rows, [cell]):
            continue
        device = args.devices[place % len(args.devices)]
        cell = dataclasses.replace(
            cell,
            device="cpu" if device == "cpu" else "cuda",
            deadline=args.began + args.seconds + 10,
        )
        target = args.out / f"ship-{'glu' if variant == 'dense' else 'fff'}.safetensors"
        environment = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
            "TRITON_CACHE_DIR": str(args.work / "triton"),
            "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:").replace("cpu", ""),
        }
        print(f"ship: {variant}, {amount / 1e6:.1f}M tokens", flush=True)
        command = [sys.executable, str(Path(__file__)), "train", cell.to_json(), str(target)]
        found.append((command, environment))
    return found


def train(text: str, target: Path) -> None:
    """One run; its model goes to `target`, squeezed."""
    from studies.compare.cell import run_cell

    cell = Cell.from_json(text)
    run_cell(cell)
    directory = Path(cell.keep) / f"{cell.section}-{cell.variant}-{cell.seeds[0]}"
    if directory.is_dir():
        squeeze(directory, target)


def is_ternary(name: str, config: ModelConfig) -> bool:
    """Is this tensor of a ternary model a matrix that products read?"""
    return config.linear == "ternary" and name.endswith(
        ("_proj.weight", "head.weight", ".w_in", ".w_out")
    )


def squeeze(directory: Path, target: Path) -> None:
    """Write the checkpoint in `directory` as one small file."""
    from safetensors.numpy import save_file

    from nomatmul.formats.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    tensors: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    for name, values in _tensors(directory):
        if is_ternary(name, config):
            shapes[name] = list(values.shape)
            ternary, scale = quantise_weight(values.reshape(-1, values.shape[-1]))
            tensors[f"{name}.packed"] = pack_ternary(ternary, _FORM)
            tensors[f"{name}.scale"] = np.asarray([scale], dtype=np.float32)
        else:
            kind = np.float16 if name.startswith("embedding") else np.float32
            tensors[name] = values.astype(kind)
    about = {
        "config": (directory / "config.json").read_text("utf-8"),
        "tokenizer": (directory / "tokenizer.json").read_text("utf-8"),
        "shapes": json.dumps(shapes),
    }
    save_file(tensors, target, metadata=about)


def _tensors(directory: Path) -> list[tuple[str, Any]]:
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return list(found.items())


def expand(source: Path, directory: Path) -> None:
    """The inverse of `squeeze`: a checkpoint whose ternary values and scales are the same.

    A latent weight is ternary * scale / (share of weights that are not 0), so that its absmean is
    the scale again; quantising it gives the ternary values back.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {}
    with safe_open(source, "np") as file:
        about = file.metadata()
        shapes = json.loads(about["shapes"])
        for name in file.keys():  # noqa: SIM118  # not a dict
            if name.removesuffix(".packed") in shapes:
                plain = name.removesuffix(".packed")
                shape, packed = shapes[plain], file.get_tensor(name)
                ternary = unpack_ternary(packed, shape[-1], _FORM).astype(np.float32)
                share = max(float(np.mean(ternary != 0)), 1e-9)
                scale = file.get_tensor(f"{plain}.scale")[0] / share
                tensors[plain] = (ternary * np.float32(scale)).reshape(shape)
            elif name.removesuffix(".scale") not in shapes:
                tensors[name] = file.get_tensor(name).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(about["config"], "utf-8")
    (directory / "tokenizer.json").write_text(about["tokenizer"], "utf-8")


def rehearse(folder: Path) -> None:
    """The dry run: a toy union model with random weights, squeezed and made whole again."""
    from nomatmul.models import CausalLM, CausalLMConfig

    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=1, channel_mixer="fff", activation="silu",
        fff_trees=2, fff_depth=2,
    )  # fmt: skip
    CausalLM(CausalLMConfig.from_model_config(config)).save_pretrained(folder / "model")
    (folder / "model/tokenizer.json").write_text("{}", "utf-8")
    squeeze(folder / "model", folder / "ship-fff.safetensors")
    expand(folder / "ship-fff.safetensors", folder / "expanded")
    before, after = (dict(_tensors(folder / name)) for name in ("model", "expanded"))
    for name in before:
        if is_ternary(name, config):
            flat = (values[name].reshape(-1, values[name].shape[-1]) for values in (before, after))
            (ours, _), (theirs, _) = (quantise_weight(values) for values in flat)
            assert np.array_equal(ours, theirs), f"{name} came back with other ternary values"
    print(f"squeezed and expanded: {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="?", choices=("train", "expand"))
    parser.add_argument("source", nargs="?", help="expand: squeezed file; train: a cell as JSON")
    parser.add_argument("target", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, help="with --tiny: folder of the toy model")
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        return rehearse(args.out or temporary())
    if args.target is None:
        parser.error("step, source and target are needed")
    if args.step == "train":
        train(args.source, args.target)
    else:
        expand(Path(args.source), args.target)


if __name__ == "__main__":
    main()
