"""The Transformer++ twin, rounded after training: int8 rows, 4-bit groups, 4-bit groups with GPTQ.

    python quantised.py MODEL-DIRECTORY ROWS < cell.json    (run.py starts it, in its dry run too)

Each form is scored as the training run was (studies/compare/cell.py), on the same texts, and
becomes a row. File bytes: a weight's bits, a float16 scale for each row or group, two bytes for
every parameter of a norm; tables and tokenizer of the file are left out. In the 4-bit forms the
embedding has int8 rows, as in our packed models.

Shapes: N outputs, K inputs of a layer, G inputs of a group.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomatmul.evaluate.rows import append_row
from nomatmul.models import CausalLM
from nomatmul.models.layers import DenseLinear
from nomatmul.ops.bitlinear import ternary_cache
from studies.compare.cell import CellTrainer
from studies.compare.plan import Cell

CALIBRATION = 2  # training batches
DAMPING = 0.01  # of the mean diagonal of the inputs' second moments, as GPTQ's authors
FORMS: dict[str, tuple[int, int, bool]] = {  # bits, group (0: a row), calibrated
    "bf16": (16, 0, False),
    "int8": (8, 0, False),
    "int4 groups of 32": (4, 32, False),
    "int4 groups of 128": (4, 128, False),
    "int4 groups of 32, GPTQ": (4, 32, True),
    "int4 groups of 128, GPTQ": (4, 128, True),
}


def round_groups(w_NK: Tensor, bits: int, group: int = 0) -> Tensor:
    """w rounded to signed integers of `bits` with one absmax scale a group of inputs (0: a row)."""
    w_NGK = w_NK.float().unflatten(1, (-1, group or w_NK.shape[1]))
    scale = group_scale(w_NGK, bits)
    return round_to(w_NGK, scale, bits).flatten(1).to(w_NK.dtype)


def group_scale(w: Tensor, bits: int) -> Tensor:
    """absmax over the last axis as the largest code, through float16; an empty group gets 1."""
    scale = (w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def round_to(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1)
    return (w / scale).round().clamp(-limit, limit - 1) * scale


def gptq(w_NK: Tensor, moment_KK: Tensor, bits: int, group: int) -> Tensor:
    """w in `bits`, each column's rounding error spread over later ones (arXiv 2210.17323).

    moment_KK: the layer's inputs' second moments, x^T x over calibration tokens.
    """
    w_NK, moment_KK = w_NK.float().clone(), moment_KK.double().clone()
    diagonal = moment_KK.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    w_NK[:, dead] = 0.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment_KK))
    upper_KK = torch.linalg.cholesky(inverse, upper=True).float()
    out = torch.empty_like(w_NK)
    for k in range(w_NK.shape[1]):
        if k % group == 0:
            scale = group_scale(w_NK[:, k : k + group], bits)
        out[:, k : k + 1] = round_to(w_NK[:, k : k + 1], scale, bits)
        error_N = (w_NK[:, k] - out[:, k]) / upper_KK[k, k]
        w_NK[:, k + 1 :] -= torch.outer(error_N, upper_KK[k, k + 1 :])
    return out


def linears(model: Any) -> Iterator[tuple[str, DenseLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, DenseLinear):
            yield name, module


@torch.no_grad()
def quantise(trainer: CellTrainer, form: str) -> None:
    """Change the trainer's float weights to those of the form, layer by layer in their order."""
    bits, group, calibrated = FORMS[form]
    model = trainer.model
    if bits == 16:
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        return
    table = model.embedding.weight
    table.copy_(round_groups(table, 8))
    for _, layer in linears(model):
        weight = layer.weight
        if calibrated:
            moment = second_moment(layer, lambda: run_calibration(trainer))
            weight.copy_(gptq(weight, moment, bits, group))
        else:
            weight.copy_(round_groups(weight, bits, group))


def second_moment(layer: DenseLinear, run: Callable[[], None]) -> Tensor:
    """[K, K] float64: x^T x of what the layer reads in `run`."""
    total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
    total = total.to(layer.weight.device)

    def add(module: Any, inputs: tuple[Any, ...]) -> None:
        x_TK = inputs[0].detach().flatten(0, -2).double()  # TF32 would round the products
        total.add_(x_TK.T @ x_TK)

    handle = layer.register_forward_pre_hook(add)
    try:
        run()
    finally:
        handle.remove()
    assert total.diagonal().sum() > 0, "the layer was not called"
    return total


def run_calibration(trainer: CellTrainer) -> None:
    """Training batches of a seed that no run has; the head is called as a module, in pieces."""
    batches = trainer.texts.batches(99)
    for _ in range(CALIBRATION):
        x_BT, _ = next(batches)
        for part_BT in x_BT.split(8):
            with trainer.plan.autocast():
                trainer.model(input_ids=part_BT, use_cache=False)


def file_bytes(model: Any, form: str) -> int:
    bits, group, _ = FORMS[form]
    table = dict(model.named_parameters())
    if bits == 16:
        return sum(2 * p.numel() for p in table.values())
    matrices = {f"{name}.weight": layer for name, layer in linears(model)}
    total = 0
    for name, p in table.items():
        if name in matrices:
            total += p.numel() * bits // 8 + 2 * p.shape[0] * (p.shape[1] // (group or p.shape[1]))
        elif p.dim() == 2:  # the embedding
            total += p.numel() + 2 * p.shape[0]
        else:
            total += 2 * p.numel()
    return total


def run(cell: Cell, directory: Path, rows: Path) -> None:
    trained = CausalLM.from_pretrained(str(directory), dtype=torch.float32).state_dict()
    with ternary_cache() as cache:
        trainer = CellTrainer(cell, cache, lambda text: None)
        for form, (_, group, _) in FORMS.items():
            if any(layer.in_features % max(group, 1) for _, layer in linears(trainer.model)):
                continue  # rows of this model are not made of such groups
            began = time.monotonic()
            trainer.model.load_state_dict(trained)
            quantise(trainer, form)
            scores = trainer.score(cell.eval_tokens)
            append_row(rows, {
                "section": "quantised", "variant": cell.variant, "label": cell.label,
                "stage": form, "status": "ok", "seed": cell.seeds[0],
                "file_bytes": file_bytes(trainer.model, form),
                "seconds": round(time.monotonic() - began, 1), "commit": cell.commit, **scores,
            })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    run(Cell.from_json(sys.stdin.read()), args.model, args.rows)


if __name__ == "__main__":
    main()
