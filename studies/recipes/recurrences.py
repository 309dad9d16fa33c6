"""Recurrences with a matrix for a state, in place of MLGRU: ternary projections, plain PyTorch.

They have MLGRU's four D x D matrices (queries and keys of half the width where there is a gate
beside them) and one state of `expansion` values a channel:

    hgrn2          S_t = diag(f_t) S + (1 - f_t) v_t^T      a gate a key element (2404.07904)
    decay          S_t = a_t S + k_t (dt_t v_t)^T           a decay a head, as Mamba-2 (2405.21060)
    gated-delta    S_t = a_t S (I - b_t k_t k_t^T) + b_t v_t k_t^T            (2412.06464)

and y_t = S_t^T q_t. Nothing here divides by a decay, so a gate of 0 is harmless.

Shape suffixes: B sequences, T steps, D hidden, H heads, K key size, V value size, N chunks, C steps
of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nomatmul.models.layers import BitLinear, RMSNorm, shared_rms
from nomatmul.models.mixer import Inputs, Pass, TokenMixer
from nomatmul.models.mixers.attention import Attention

HEAD = 64  # value elements of a head with a scalar decay
LEAST = 1e-6  # of a forget gate: its logarithm is finite


class HGRN2(TokenMixer):
    """Forget gates of every key element; a head has `expansion` key and value elements."""

    def __init__(self, size: int, layer: int, expansion: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.layer, self.expansion = layer, expansion
        for name in ("i_proj", "f_proj", "q_proj", "o_proj"):
            setattr(self, name, BitLinear(size, size, eps))
        self.y_norm = RMSNorm(size, eps)

    def inputs(self, tokens: Pass) -> Inputs:
        return (tokens.lower_bound(self.layer),)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        assert cache is None, "trains only"
        rms = shared_rms(x, self.i_proj)
        f_BTD = torch.sigmoid(self.f_proj(x, rms).float())
        if inputs and inputs[0] is not None:
            f_BTD = inputs[0].float() + (1 - inputs[0].float()) * f_BTD
        q_BTD, v_BTD = F.silu(self.q_proj(x, rms).float()), self.i_proj(x, rms).float()
        log_BTD = f_BTD.clamp(min=LEAST).log()
        heads = [_heads(t, self.expansion) for t in (q_BTD, 1 - f_BTD, v_BTD, log_BTD)]
        with torch.autocast(x.device.type, enabled=False):
            y_BTD = decayed(*heads).flatten(2)
        return self.o_proj(self.y_norm(y_BTD)).to(x.dtype)


class Scalar(TokenMixer):
    """One decay a head: plain ("decay") or with the delta rule ("gated-delta")."""

    def __init__(self, size: int, layer: int, delta: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.layer, self.delta, self.heads = layer, delta, size // HEAD
        for name, outputs in (("q", size // 2), ("k", size // 2), ("v", size), ("g", size)):
            setattr(self, f"{name}_proj", BitLinear(size, outputs, eps))
        self.gates = BitLinear(size, 2 * self.heads, eps)
        self.o_proj = BitLinear(size, size, eps)
        self.y_norm = RMSNorm(HEAD, eps)
        # as Mamba-2 draws them: rates of 1 to 16, steps of 0.001 to 0.1
        self.log_rate = nn.Parameter(torch.linspace(1, 16, self.heads).log())
        steps = torch.logspace(math.log10(1e-3), -1, self.heads)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    def inputs(self, tokens: Pass) -> Inputs:
        return (None,)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        assert cache is None, "trains only"
        rms = shared_rms(x, self.q_proj)
        q, k, v = (p(x, rms).float() for p in (self.q_proj, self.k_proj, self.v_proj))
        a_BTH, b_BTH = self.gates(x, rms).float().chunk(2, -1)
        dt_BTH = F.softplus(a_BTH + self.step_bias)
        log_BTH = -dt_BTH * self.log_rate.exp()
        q_BTHK, k_BTHK, v_BTHV = (_heads(F.silu(t), t.shape[-1] // self.heads) for t in (q, k, v))
        with torch.autocast(x.device.type, enabled=False):
            if self.delta:
                q_BTHK, k_BTHK = (F.normalize(t, dim=-1) for t in (q_BTHK, k_BTHK))
                y = delta_rule(q_BTHK, k_BTHK, v_BTHV, log_BTH, torch.sigmoid(b_BTH))
            else:
                v_BTHV = v_BTHV * dt_BTH.unsqueeze(-1)
                y = decayed(q_BTHK, k_BTHK, v_BTHV, log_BTH.unsqueeze(-1))
        gate_BTHV = _heads(F.silu(self.g_proj(x, rms).float()), HEAD)
        return self.o_proj((self.y_norm(y) * gate_BTHV).flatten(2)).to(x.dtype)


def _heads(x_BTD: Tensor, size: int) -> Tensor:
    return x_BTD.unflatten(-1, (-1, size))


def decayed(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_BTHK: Tensor, chunk: int = 16
) -> Tensor:
    """y [B, T, H, V] of S_t = exp(log_t) S_(t-1) + k_t v_t^T, y_t = S_t^T q_t.

    log: of the decays, [..., K], or [..., 1] for one a head. T is a multiple of `chunk`.
    """
    chunk = min(chunk, q_BTHK.shape[1])
    q, k, v, log = (
        t.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for t in (q_BTHK, k_BTHK, v_BTHV, log_BTHK)
    )  # [B, H, N, C, .]
    kept = log.cumsum(3)
    whole = kept[..., -1:, :]
    # inside a chunk: differences of logarithms, of which only those that forget are used
    apart = (kept.unsqueeze(4) - kept.unsqueeze(3)).clamp(max=0).exp()  # [B, H, N, C, C, .]
    if log.shape[-1] == 1:
        scores = q @ k.transpose(-1, -2) * apart.squeeze(-1)
    else:
        scores = (q.unsqueeze(4) * apart * k.unsqueeze(3)).sum(-1)
    y = scores.tril() @ v
    # between chunks: what each of them adds, and how much of it later ones keep
    added = (k * (whole - kept).exp()).transpose(-1, -2) @ v  # [B, H, N, K, V]
    total = whole.squeeze(3).cumsum(2)
    before = total - whole.squeeze(3)  # of the chunks before this one
    share = (before.unsqueeze(3) - total.unsqueeze(2)).clamp(max=0).exp()  # [B, H, N, N, .]
    share = share * share.new_ones(share.shape[2:4]).tril(-1).unsqueeze(-1)
    share = share.permute(0, 1, 4, 2, 3)  # [B, H, ., N, N]
    state = (share @ added.transpose(2, 3)).transpose(2, 3)  # [B, H, N, K, V]
    y = y + (q * kept.exp()) @ state
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)


def delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_BTH: Tensor, b_BTH: Tensor, chunk: int = 64
) -> Tensor:
    """y [B, T, H, V] of the gated delta rule, chunk by chunk (2412.06464, section 3).

    k has unit length. T is a multiple of `chunk`.
    """
    chunk = min(chunk, q_BTHK.shape[1])
    q, k, v, log, b = (
        t.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for t in (q_BTHK, k_BTHK, v_BTHV, log_BTH.unsqueeze(-1), b_BTH.unsqueeze(-1))
    )
    kept = log.cumsum(3)  # [B, H, N, C, 1]
    apart = (kept - kept.transpose(-1, -2)).clamp(max=0).exp()  # [B, H, N, C, C]
    step = -((b * k) @ k.transpose(-1, -2) * apart).tril(-1)
    inverse = torch.eye(chunk, dtype=k.dtype, device=k.device).expand_as(step)
    for _ in range((chunk - 1).bit_length()):  # (I - A)^-1 = (I + A)(I + A^2)(I + A^4)...
        inverse, step = inverse + step @ inverse, step @ step
    new, old = inverse @ (b * v), inverse @ (b * k * kept.exp())
    inside, reads = (q @ k.transpose(-1, -2) * apart).tril(), q * kept.exp()
    writes, left = k * (kept[..., -1:, :] - kept).exp(), kept[..., -1:, :].exp()
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    out = []
    for n in range(k.shape[2]):
        fresh = new[:, :, n] - old[:, :, n] @ state
        out.append(reads[:, :, n] @ state + inside[:, :, n] @ fresh)
        state = state * left[:, :, n] + writes[:, :, n].transpose(-1, -2) @ fresh
    return torch.stack(out, 2).permute(0, 2, 3, 1, 4).flatten(1, 2)


def compile_recurrences() -> None:
    """Their element-wise steps in few kernels; the CUDA graph of a training step records those."""
    global decayed, delta_rule
    decayed, delta_rule = (torch.compile(f, dynamic=False) for f in (decayed, delta_rule))


def make_mixer(name: str, size: int, layer: int) -> TokenMixer:
    """One of MIXERS for a layer of MatMul-free models."""
    if name.startswith("hgrn2-"):
        return HGRN2(size, layer, int(name.removeprefix("hgrn2-")))
    if name == "attention":
        return Attention(size, size // HEAD, linear="ternary", layer=layer)
    return Scalar(size, layer, delta=name == "gated-delta")


MIXERS = ("attention", "decay", "gated-delta", "hgrn2-8", "hgrn2-32")


def replace_mixers(model: Any, name: str, every: int) -> None:
    """Gives each `every`-th layer, the last of each such run, the mixer of this name."""
    for layer, block in enumerate(model.layers):
        if layer % every == every - 1:
            weight = block.mixer_norm.weight
            block.mixer = make_mixer(name, len(weight), layer).to(weight.device)
