"""Every training kernel against its plain reference: one list for the interpreter and the GPU.

A case is (name, results, expected, bound). Fresh memory is filled with
NaN (the largest integer for int8), so an element that a kernel does not write shows up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Case = tuple[str, Any, Any, float]
ROWS = ((5, 48), (1, 33), (4, 300))
PRODUCTS = ((1, 5, 33), (65, 70, 130), (33, 31, 64))
SCANS = ((2, 33, 5), (1, 1, 40), (1, 70, 33))
ENTROPIES = ((3, 33), (2, 5000))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def error(ours: Any, theirs: Any) -> float:
    """Largest relative error of a result or a list of them; NaN counts as infinite."""
    if isinstance(ours, Tensor):
        ours, theirs = [ours], [theirs]
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        value = float((a - b).norm() / b.norm().clamp(min=1e-30))
        worst = max(worst, value if value == value else float("inf"))
    return worst


def _draw(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _wide(values: Any) -> Any:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def _row_cases(device: str, dtype: torch.dtype, n: int, d: int, bound: float) -> Iterator[Case]:
    from nomatmul.ops.bitlinear import glu_backward, rows, rows_backward, steps

    def draw(*shape: int) -> Tensor:
        return _draw(device, dtype, *shape)

    x, h, grad, gu, grads = (
        draw(n, d),
        draw(n, d).float(),
        draw(n, d),
        draw(n, 2 * d),
        draw(3, n, d),
    )
    outer, norms = 1 + 0.2 * draw(d).float(), 1 + 0.2 * draw(3, d).float()
    w_scale = torch.rand(3, device=device)
    for out in (torch.int8, dtype):
        # a rounding may flip where exp differs in its last bit: one unit of one element
        close = 1e-6 if out != torch.bfloat16 else 1e-2
        for o in (outer, None):
            args = (x, o, norms, 1e-6, 1e-5, out)
            name = f"norm_quantize {n}x{d} {out} outer={o is not None}"
            yield name, rows.norm_quantize(*args), steps.norm_quantize(*args), close
        args = (gu, outer, 1e-6, out)
        expected = steps.glu_quantize(*args)
        yield f"glu_quantize {n}x{d} {out}", rows.glu_quantize(*args), expected, 1e-2
        args = (x, h, outer, norms[0], 1e-5, 1e-6, out)
        expected = steps.gate_quantize(*args)
        yield f"gate_quantize {n}x{d} {out}", rows.gate_quantize(*args), expected, 1e-2
    for groups in (1, 3):
        for o, residual in ((outer, grad), (None, None)):
            args = (x, o, norms[:groups], grads[:groups], w_scale[:groups], residual, 1e-6, 1e-5)
            ours, exact = rows_backward.norm_backward(*args), steps.norm_backward(*_wide(args))
            yield f"norm_backward {n}x{d} G={groups}", ours, exact, bound
    args = (gu, outer, grad, w_scale[:1], 1e-6)
    exact, rounded = steps.glu_backward(*_wide(args)), steps.glu_backward(*args)
    for in_place in (False, True):
        mine = (gu.clone(), outer, grad.clone(), w_scale[:1], 1e-6, in_place)
        ours = glu_backward.glu_backward(*mine)
        yield f"glu_backward {n}x{d}", (ours[0], ours[2]), (exact[0], exact[2]), bound
        yield f"glu_backward, y {n}x{d}", ours[1], rounded[1], 1e-2
    args = (x, h, outer, norms[0], grad, w_scale[:1], 1e-5, 1e-6)
    exact, rounded = steps.gate_backward(*_wide(args)), steps.gate_backward(*args)
    ours = rows_backward.gate_backward(*args[:4], grad.clone(), *args[5:])
    yield f"gate_backward {n}x{d}", (*ours[:2], *ours[3:]), (*exact[:2], *exact[3:]), bound
    yield f"gate_backward, y {n}x{d}", ours[2], rounded[2], 1e-2


def _product_cases(
    device: str, dtype: torch.dtype, n: int, m: int, k: int, bound: float
) -> Iterator[Case]:
    from nomatmul.ops.bitlinear import steps
    from nomatmul.ops.bitlinear import triton as products

    weights = [torch.randn(m, k, device=device) * 0.1 for _ in range(3)]
    t, w_scale = products.ternarize(*weights)
    yield f"ternarize {m}x{k}", (t, w_scale), steps.ternarize(*weights), 0.0
    q = torch.randint(-128, 128, (3, n, k), dtype=torch.int8, device=device)
    step, residual = torch.rand(3, n, device=device), _draw(device, dtype, n, m)
    exact = torch.matmul(q.double(), t.double().transpose(1, 2))
    scaled = exact * (w_scale.double()[:, None] * step.double()).unsqueeze(-1)
    name = f"product {n}x{m}x{k}"
    yield f"{name} int32", products.product(q, t, None, None, torch.int32), exact, 0.0
    yield f"{name} grouped", products.product(q, t, step, w_scale, dtype), scaled, bound
    one = products.product(q[:1], t[:1], step[:1], w_scale[:1], dtype, residual)
    yield f"{name} residual", one, scaled[:1] + residual.double(), bound
    if device != "cpu":
        ours = products.product(q, t, None, None, torch.int32, persistent=True)
        yield f"{name} persistent", ours, exact, 0.0
        ours = products.product(q, t, None, None, torch.int32, descriptors=False)
        yield f"{name} without TMA", ours, exact, 0.0


def _scan_cases(
    device: str, dtype: torch.dtype, b: int, t: int, d: int, bound: float
) -> Iterator[Case]:
    from nomatmul.ops.mlgru import gated, naive

    i, f = _draw(device, dtype, b, t, d), _draw(device, dtype, b, t, d)
    dh = torch.randn(b, t, d, device=device)
    for floor in (torch.rand(d, device=device), None):
        args = (i, f, floor)
        h = naive.gated_scan(*_wide(args))
        name = f"{b}x{t}x{d} bound={floor is not None}"
        yield f"gated_scan {name}", gated.gated_scan(*args), h, 1e-6
        ours = gated.gated_scan_backward(*args, h.float(), dh)
        exact = naive.gated_scan_backward(*_wide((*args, h, dh)))
        yield f"gated_scan_backward {name}", ours, exact, bound


def _entropy_cases(device: str, dtype: torch.dtype, n: int, v: int, bound: float) -> Iterator[Case]:
    from nomatmul.ops.loss import naive as plain
    from nomatmul.ops.loss import triton as losses

    logits = _draw(device, dtype, n, v) * 3
    target = torch.randint(0, v, (n,), device=device)
    target[1] = -100
    scales = (torch.tensor(0.7, device=device), torch.tensor(0.3, device=device))
    for gradient in (True, False):
        ours = losses.cross_entropy_rows(logits.clone(), target, -100, *scales, gradient)
        args = _wide((logits, target, -100, *scales, gradient))
        yield f"cross_entropy {n}x{v}", ours, plain.cross_entropy_rows(*args), max(bound, 4e-6)
        taught = _draw(device, dtype, n, v + 5) * 3  # a padded vocabulary: columns too many
        for mix in ((0.4, 1.0), (1.0, 2.5)):
            args = (taught, target, -100, *mix, *scales, gradient)
            ours = losses.mixed_rows(logits.clone(), *args)
            exact = plain.mixed_rows(*_wide((logits, *args)))
            yield f"mixed {n}x{v} {mix}", ours, exact, max(bound, 4e-6)
    target[0] = v
    wrong = losses.cross_entropy_rows(logits, target, -100, *scales, True)[0].isnan()
    yield f"cross_entropy {n}x{v}, no such target", wrong, torch.arange(n, device=device) == 0, 0.0


FAMILIES = {
    "rows": (_row_cases, ROWS, ((3000, 1024), (1111, 2816), (130, 5632))),
    "products": (_product_cases, PRODUCTS, ((1000, 1024, 1024), (127, 3000, 2816))),
    "scans": (_scan_cases, SCANS, ((3, 1025, 200),)),
    "entropies": (_entropy_cases, ENTROPIES, ((300, 32000),)),
}


def failures(
    device: str, dtype: torch.dtype, family: str, large: bool = False
) -> tuple[list[str], int]:
    """(one line a failing case, how many cases ran) of a family over awkward shapes.

    large: shapes of models too, for a GPU.
    """
    torch.manual_seed(0)
    bound = 2e-6 if dtype == torch.float32 else 6e-3  # bf16 rounds once: 2^-8 at most
    draw, small, big = FAMILIES[family]
    found, count = [], 0
    with poisoned():
        for shape in (*small, *(big if large else ())):
            for name, ours, theirs, limit in draw(device, dtype, *shape, bound):
                count += 1
                value = error(ours, theirs)
                if not value <= limit:
                    found.append(f"{dtype} {name}: {value:.2e} > {limit:.0e}")
    return found, count


def gradients(model: Any, ids: Tensor, path: str, bf16: bool = False, z: float = 0.0) -> list:
    """[loss, gradient of each parameter] of one step; path: "triton" or "naive" operations."""
    model.zero_grad()
    with (
        mock.patch.dict(os.environ, NOMATMUL_OPS=path),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16),
    ):
        loss, square = model.loss(ids, ids.roll(-1, 1), chunk=50)
        (loss + z * square).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def least_model_errors(model: Any, drawings: int, z: float = 0.0) -> tuple[float, float]:
    """Smallest error of the loss and of the worst gradient, triton against naive, over drawings
    of 18 tokens in float32.

    Why the smallest: where the two paths differ in the last bit of a sigmoid or a sum, a value on
    the edge between two int8 numbers falls to either side. Such a flip moves a token by 1e-3, and a
    gradient by 4e-4 to 2e-2 (measured on a CPU with noise of 1e-7 to 3e-7 in each sigmoid, 24
    drawings: none in three quarters of them, and then all errors are below 2e-6). A wrong kernel
    is wrong in every drawing.
    """
    losses, worst = [], []
    device = next(model.parameters()).device
    for _ in range(drawings):
        ids = torch.randint(0, model.config.vocab_size, (2, 9), device=device)
        ours = [g.clone() for g in gradients(model, ids, "triton", z=z)]
        plain = gradients(model, ids, "naive", z=z)
        losses.append(error(ours[0], plain[0]))
        worst.append(max(error(a, b) for a, b in zip(ours, plain, strict=True)))
    return min(losses), min(worst)
