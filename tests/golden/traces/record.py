"""Record the golden traces (README.md beside this file). Run it only on purpose: the committed
values come from the commit that the README names, and later code is compared with them.

    export PYTHONPATH=src:tests:tests/engine
    python tests/golden/traces/record.py            # expected values, from the stored weights
    python tests/golden/traces/record.py --weights  # new weights and inputs as well
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import golden_traces as g
import numpy as np
from encoder_files import CLASSES, encoder_tensors_of
from model_files import random_tensors, write_json
from safetensors.numpy import load_file, save_file

import nomatmul
from nomatmul.formats.encoder import EncoderHead, EncoderReading

HERE = Path(__file__).resolve().parent


def narrow(tensors: dict[str, Any]) -> dict[str, Any]:
    """Half the bytes: float16 values, which every reader widens exactly."""
    return {name: values.astype(np.float16) for name, values in tensors.items()}


def write_weights() -> None:
    rng = np.random.default_rng(20261130)
    for name, config in g.DECODERS.items():
        target = HERE / name
        target.mkdir(exist_ok=True)
        write_json(target / "config.json", {"model_type": "nomatmul", **config.to_dict()})
        save_file(narrow(random_tensors(config, rng)), target / "model.safetensors")
    for seed, (name, (config, task, labels)) in enumerate(g.ENCODERS.items()):
        target, head = HERE / name, EncoderHead(pooler_size=14)
        target.mkdir(exist_ok=True)
        tensors = encoder_tensors_of(config, EncoderReading(task, head, labels), seed)
        values: dict[str, Any] = {
            "model_type": "nomatmul-encoder",
            "architectures": [CLASSES[task]],
            **dataclasses.asdict(config),
            **vars(head),
        }
        if labels:
            values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        write_json(target / "config.json", values)
        save_file(narrow(tensors), target / "model.safetensors")
    size, rows = 75, 5 * 15
    mask = np.ones((3, 17), np.int32)
    mask[0, 12:] = 0
    mask[1, [0, 6]] = 0
    inputs = {
        "decoder_ids": rng.integers(0, 97, 53).astype(np.int32),
        "q": rng.integers(-128, 128, (7, 72)).astype(np.int8),
        "walk_x": rng.standard_normal((9, 72)).astype(np.float32),
        "encoder_ids": rng.integers(0, 48, mask.shape).astype(np.int32),
        "encoder_mask": mask,
        "fff.x": rng.standard_normal((37, size)).astype(np.float32),
        "fff.w_in": (rng.standard_normal((rows, size)) / 8).astype(np.float32),
        "fff.w_out": (rng.standard_normal((rows, size)) / 8).astype(np.float32),
        "fff.bias": (rng.standard_normal(rows) / 8).astype(np.float32),
        "fff.norm_in": (1 + rng.standard_normal(size) / 5).astype(np.float32),
        "fff.norm_out": (1 + rng.standard_normal(rows) / 5).astype(np.float32),
    }
    save_file(inputs, HERE / "inputs.safetensors")


def main() -> None:
    if "--weights" in sys.argv[1:]:
        write_weights()
    inputs = load_file(HERE / "inputs.safetensors")
    expected: dict[str, Any] = {}
    hashes: dict[str, Any] = {"box": g.box_hashes()}
    with tempfile.TemporaryDirectory() as temporary:
        for case in (*g.DECODER_CASES, *g.ENCODER_CASES):
            directory = g.packed(case, Path(temporary) / case)
            hashes[case] = g.payload_hashes(directory)
            if case in g.ENCODER_CASES:
                ids, mask = inputs["encoder_ids"], inputs["encoder_mask"]
                observed = g.run_encoder(directory, ids, mask, threads=1, isa="scalar")
            else:
                lm = nomatmul.load(directory, threads=1, isa="scalar")
                observed = g.run_decoder(lm, inputs["decoder_ids"], 53)
                linear = "layers.1.mixer.g_proj"
                observed["acc"] = g.accumulators(lm, linear, inputs["q"])
                if case.startswith("union"):
                    walked = g.walk(lm, 1, inputs["walk_x"])
                    observed |= {f"walk.{key}": values for key, values in walked.items()}
            expected |= {f"{case}.{key}": values for key, values in observed.items()}
        for name, case in g.OLD_PACKED.items():
            if not (HERE / name).exists():
                shutil.copytree(Path(temporary) / case, HERE / name)
    stored = {key[4:]: values for key, values in inputs.items() if key.startswith("fff.")}
    for form in g.FFF_FORMS:
        observed = g.run_fff(form, stored, isa="scalar")
        expected |= {f"fff.{form}.{key}": values for key, values in observed.items()}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in expected.items()}, HERE / "traces.safetensors"
    )
    write_json(HERE / "hashes.json", hashes)


if __name__ == "__main__":
    main()
