"""A head and its cross-entropy as one operation: no logits outlive their chunk, none is redone.

While a chunk's logits exist, its loss and its gradients are computed: d(hidden) is stored,
d(head weight) added up. The backward pass only multiplies them by the incoming gradient. A z-loss
is not known in the forward pass, so a gradient of z repeats the pass with both gradients in place.
A teacher's distribution may be among the targets; its logits live as long as the student's.

Shape suffixes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.bitlinear.naive import product_dtype
from nomatmul.ops.fused.parts import operator, plain_math, product, step, weights_for
from nomatmul.ops.loss import naive
from nomatmul.ops.loss.taught import Taught, logits_of

DEFAULT_CHUNK = 2048
_FAST = "nomatmul.ops.loss.triton"


def _add_product(total_VD: Tensor, d_NV: Tensor, y_ND: Tensor) -> None:
    """total += d^T y, 16-bit operands summed in float32."""
    if d_NV.is_cuda and d_NV.dtype != total_VD.dtype:
        try:
            total_VD.add_(torch.mm(d_NV.t(), y_ND, out_dtype=total_VD.dtype))
            return
        except TypeError:  # torch before 2.8
            pass
    total_VD.add_(torch.mm(d_NV.t(), y_ND))


class _TernaryHead:
    """Logits and gradients of a BitLinear head, chunk by chunk."""

    def __init__(
        self,
        weight: Tensor,
        norm: Tensor,
        eps: float,
        slot: int,
        dtype: torch.dtype,
        full_precision: bool = False,
    ) -> None:
        self.norm, self.eps, self.dtype = norm, eps, dtype
        self.t, self.w_scale = weights_for(slot, (weight,), dtype, full_precision)
        self.dnorm: Tensor | float = 0.0

    def logits(self, x: Tensor) -> Tensor:
        q, scale = step("norm_quantize", x, None, self.norm[None], 0.0, self.eps, self.t.dtype)
        return product(q, self.t, scale, self.w_scale, self.dtype)[0]

    def backward(self, x: Tensor, d_NV: Tensor, dweight: Tensor) -> Tensor:
        norms = self.norm[None]
        y, _ = step("norm_quantize", x, None, norms, 0.0, self.eps, self.dtype)
        _add_product(dweight, d_NV, y[0])
        y = torch.mm(d_NV, self.wide).unsqueeze(0)
        dx, _, dnorm = step("norm_backward", x, None, norms, y, self.w_scale, None, 0.0, self.eps)
        self.dnorm = self.dnorm + dnorm
        return dx

    def prepare_backward(self) -> None:
        self.wide = self.t[0].to(self.dtype)


class _DenseHead:
    """The same for a plain weight."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight, self.dtype = weight.to(dtype), dtype

    def logits(self, x: Tensor) -> Tensor:
        return torch.mm(x.to(self.dtype), self.weight.t())

    def backward(self, x: Tensor, d_NV: Tensor, dweight: Tensor) -> Tensor:
        _add_product(dweight, d_NV, x.to(self.dtype))
        return torch.mm(d_NV, self.weight).to(x.dtype)

    def prepare_backward(self) -> None:
        """Nothing to do."""


def _rows(
    logits: Tensor,
    target: Tensor,
    ignored: int,
    taught: Taught | None,
    part: slice,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss, z, divergence, dlogits) of a chunk's rows; without a teacher no divergence."""
    if taught is None:
        loss, z, d = choose.run("cross_entropy_rows", _FAST, naive, logits, target, ignored, *rest)
        return loss, z, None, d
    wanted, numbers = logits_of(taught.teacher, part, logits), (taught.share, taught.temperature)
    return choose.run("mixed_rows", _FAST, naive, logits, wanted, target, ignored, *numbers, *rest)


def _linear_cross_entropy_fake(
    x, target, weight, norm, loss_scale, z_scale, eps, chunk, ignored, slot, dtype,
    full_precision, gradient, teacher=-1, share=0.0, temperature=1.0,
):  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalars = [x.new_empty((), dtype=wide) for _ in range(4)]
    if not gradient:
        return *scalars, *[x.new_empty(0) for _ in range(3)]
    dnorm = x.new_empty(0) if norm is None else torch.empty_like(norm, dtype=wide)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return *scalars, dx, torch.empty_like(weight, dtype=wide), dnorm


@operator("linear_cross_entropy", _linear_cross_entropy_fake)
@plain_math
def _linear_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    loss_scale: Tensor,
    z_scale: Tensor,
    eps: float,
    chunk: int,
    ignored: int,
    slot: int,
    dtype: torch.dtype,
    full_precision: bool,
    gradient: bool,
    teacher: int = -1,
    share: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of what is minimised, z, cross-entropy, divergence; d(hidden), d(weight), d(norm)."""
    head: Any = _DenseHead(weight, dtype)
    if norm is not None:
        head = _TernaryHead(weight, norm, eps, slot, dtype, full_precision)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    taught = Taught(teacher, share, temperature) if teacher >= 0 else None
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if gradient:
        head.prepare_backward()
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
    losses, zs, divergences = [], [], []
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        loss, z, divergence, d = _rows(
            head.logits(x[part]), target[part], ignored, taught, part, loss_scale, z_scale, gradient
        )
        losses.append(loss.sum())
        zs.append(z.sum())
        if divergence is not None:
            divergences.append(divergence.sum())
        if gradient:
            dx[part] = head.backward(x[part], d, dweight)
    dnorm = head.dnorm if gradient and norm is not None else x.new_empty(0)
    plain, divergence = torch.stack(losses).sum(), x.new_zeros((), dtype=wide)
    total = plain.clone()
    if taught is not None:
        divergence = torch.stack(divergences).sum()
        total = (1 - share) * plain + share * temperature**2 * divergence
    return total, torch.stack(zs).sum(), plain, divergence, dx, dweight, dnorm


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, target, weight, norm, _, z_scale, *ctx.rest = inputs
    ctx.save_for_backward(x, target, weight, norm, z_scale, *output[4:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, dz: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, target, weight, norm, zero, dx, dweight, dnorm = ctx.saved_tensors
    if dz is not None:
        scale = zero if dloss is None else dloss
        *_, dx, dweight, dnorm = _linear_cross_entropy(
            x, target, weight, norm, scale, dz, *ctx.rest
        )
    elif dloss is not None:
        dx, dweight, dnorm = dx * dloss.to(dx.dtype), dweight * dloss, dnorm * dloss
    else:
        return (None,) * 16
    dnorm = None if norm is None else dnorm.to(norm.dtype)
    return (dx, None, dweight.to(weight.dtype), dnorm, *([None] * 12))


torch.library.register_autograd(
    "nomatmul::linear_cross_entropy", _backward, setup_context=_setup_context
)


class Mixed(NamedTuple):
    """Means over the targets that count, float32 scalars; gradients flow through the first two.

    total: what is minimised, (1 - share) * loss + share * temperature^2 * divergence. loss: plain
    cross-entropy of the targets. divergence: KL(teacher || student), 0 where both agree.
    """

    total: Tensor
    z: Tensor
    loss: Tensor
    divergence: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    *,
    eps: float = 1e-6,
    slot: int = -1,
    chunk: int = 0,
    full_precision: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a head without bias, and z, as `chunked_cross_entropy` gives them.

    hidden: [..., D]; targets: integer [...]; weight: [V, D]; norm: [D] for a ternary head
    (BitLinear with `eps`, `slot` from `new_slot`), None for a dense one. chunk: tokens whose
    logits live at once, 0 for 2048. full_precision: the weight of a ternary head is not rounded.
    Gradients for hidden, weight and norm.
    Raises ValueError if the shapes disagree.
    """
    sums = _call(hidden, targets, weight, norm, eps, slot, chunk, full_precision, ())
    return sums.total, sums.z


def mixed_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    *,
    taught: Taught,
    eps: float = 1e-6,
    slot: int = -1,
    chunk: int = 0,
    full_precision: bool = False,
) -> Mixed:
    """The same with a teacher's distribution among the targets.

    taught.share: what it counts, the text's next token counts the rest. taught.temperature: both
    models' logits are divided by it before their softmax is compared. The teacher has looked at
    the tokens of `hidden`, in the order of its flattened rows.
    Raises ValueError if the shapes disagree.
    """
    return _call(hidden, targets, weight, norm, eps, slot, chunk, full_precision, taught)


def _call(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    slot: int,
    chunk: int,
    full_precision: bool,
    taught: tuple[Any, ...],
) -> Mixed:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"cross-entropy: hidden {tuple(hidden.shape)} does not fit targets "
            f"{tuple(targets.shape)} and weight {tuple(weight.shape)}"
        )
    if chunk < 0:
        raise ValueError(f"cross-entropy: chunk {chunk} is below 0")
    dtype = product_dtype(hidden)
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    target_N = targets.reshape(-1)
    tracked = [t for t in (x_ND, weight, norm) if t is not None]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tracked)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=wide, device=hidden.device)
    total, z, loss, divergence, *_ = _linear_cross_entropy(
        x_ND, target_N, weight, norm, one, torch.zeros_like(one), eps, chunk or DEFAULT_CHUNK,
        naive.IGNORE_INDEX, slot, dtype, full_precision, gradient, *taught,
    )  # fmt: skip
    count = (target_N != naive.IGNORE_INDEX).sum().clamp(min=1)
    return Mixed(total / count, z / count, loss.detach() / count, divergence.detach() / count)
