"""Recurrences with a matrix for a state, in place of MLGRU: ternary projections, plain PyTorch.

They have MLGRU's four D x D matrices, cut into more (queries and keys of half the width where there
is a gate or a decay beside them), and one state S [K, V] of `expansion` values a channel:

    hgrn2          S_t = diag(f_t) S + (1 - f_t) v_t^T       a gate a key element (2404.07904)
    decay          S_t = a_t S + k_t (dt_t v_t)^T            a decay a head, as Mamba-2 (2405.21060)
    gated-delta    S_t = a_t (I - b_t k_t k_t^T) S + b_t k_t v_t^T                (2412.06464)
    rwkv7          S_t = (diag(w_t) - (b_t k_t) k_t^T) S + (b_t k_t) v_t^T, b_t and w_t a key
                   element, as RWKV-7 (2503.14456) without its token shift and small matrices

and y_t = S_t^T q_t. `chunks.py` computes them.

Shape suffixes: B sequences, T steps, D hidden, H heads, K key size, V value size.
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
from studies.recipes import chunks

HEAD = 64  # value elements of a head that has fewer keys
SLOWEST = math.exp(-0.5)  # of RWKV-7: no element forgets more than 1 - exp(-SLOWEST) a step


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
        f_BTD = f_BTD.clamp(min=math.exp(chunks.LOWEST))
        q_BTD, v_BTD = F.silu(self.q_proj(x, rms).float()), self.i_proj(x, rms).float()
        heads = [_heads(t, self.expansion) for t in (q_BTD, 1 - f_BTD, v_BTD, f_BTD.log())]
        with torch.autocast(x.device.type, enabled=False):
            y_BTD = chunks.recur(*heads).flatten(2)
        return self.o_proj(self.y_norm(y_BTD)).to(x.dtype)


class Headed(TokenMixer):
    """Heads of 64 value elements and half as many keys; what stands for each is the subclass's."""

    extra: tuple[str, ...] = ()  # projections beside q and k, of half the width like them

    def __init__(self, size: int, layer: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.layer, self.heads = layer, size // HEAD
        for name in ("q", "k", *self.extra):
            setattr(self, f"{name}_proj", BitLinear(size, size // 2, eps))
        for name in ("v", "o"):
            setattr(self, f"{name}_proj", BitLinear(size, size, eps))
        self.y_norm = RMSNorm(HEAD, eps)

    def inputs(self, tokens: Pass) -> Inputs:
        return (None,)

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        assert cache is None, "trains only"
        rms = shared_rms(x, self.q_proj)
        q_BTHK, k_BTHK, v_BTHV = (
            _heads(F.silu(self._project(name, x, rms)), size)
            for name, size in (("q", HEAD // 2), ("k", HEAD // 2), ("v", HEAD))
        )
        y_BTHV = self._recur(x, rms, q_BTHK, k_BTHK, v_BTHV)
        return self.o_proj(self._gated(x, rms, self.y_norm(y_BTHV)).flatten(2)).to(x.dtype)

    def _project(self, name: str, x: Tensor, rms: Tensor | None) -> Tensor:
        projected: Tensor = getattr(self, f"{name}_proj")(x, rms)
        return projected.float()

    def _gated(self, x: Tensor, rms: Tensor | None, y_BTHV: Tensor) -> Tensor:
        return y_BTHV

    def _recur(
        self, x: Tensor, rms: Tensor | None, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor
    ) -> Tensor:
        raise NotImplementedError


class Scalar(Headed):
    """One decay a head: plain ("decay") or with the delta rule ("gated-delta")."""

    def __init__(self, size: int, layer: int, delta: bool, eps: float = 1e-6) -> None:
        super().__init__(size, layer, eps)
        self.delta = delta
        self.g_proj = BitLinear(size, size, eps)
        self.gates = BitLinear(size, 2 * self.heads, eps)
        # as Mamba-2 draws them: rates of 1 to 16, steps of 0.001 to 0.1
        self.log_rate = nn.Parameter(torch.linspace(1, 16, self.heads).log())
        steps = torch.logspace(math.log10(1e-3), -1, self.heads)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    def _recur(
        self, x: Tensor, rms: Tensor | None, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor
    ) -> Tensor:
        a_BTH1, b_BTH1 = self.gates(x, rms).float().unsqueeze(-1).chunk(2, -2)
        dt_BTH1 = F.softplus(a_BTH1 + self.step_bias.unsqueeze(-1))
        log_BTH1 = -dt_BTH1 * self.log_rate.exp().unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            if not self.delta:
                return chunks.recur(q_BTHK, k_BTHK, v_BTHV * dt_BTH1, log_BTH1)
            q_BTHK, k_BTHK = (F.normalize(t, dim=-1) for t in (q_BTHK, k_BTHK))
            write_BTHK = k_BTHK * torch.sigmoid(b_BTH1)
            look_BTHK = k_BTHK * log_BTH1.exp()  # the rule reads what the decay has left
            return chunks.recur(q_BTHK, write_BTHK, v_BTHV, log_BTH1, look_BTHK)

    def _gated(self, x: Tensor, rms: Tensor | None, y_BTHV: Tensor) -> Tensor:
        return y_BTHV * _heads(F.silu(self._project("g", x, rms)), HEAD)


class RWKV7(Headed):
    """Decay and rate of the delta rule of every key element; no gate behind it."""

    extra = ("w", "a")

    def _recur(
        self, x: Tensor, rms: Tensor | None, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor
    ) -> Tensor:
        w_BTHK, a_BTHK = (
            _heads(torch.sigmoid(self._project(name, x, rms)), HEAD // 2) for name in self.extra
        )
        k_BTHK = F.normalize(k_BTHK, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return chunks.recur(q_BTHK, k_BTHK * a_BTHK, v_BTHV, -SLOWEST * w_BTHK, k_BTHK)


def _heads(x_BTD: Tensor, size: int) -> Tensor:
    return x_BTD.unflatten(-1, (-1, size))


def make_mixer(name: str, size: int, layer: int) -> TokenMixer:
    """One of MIXERS for a layer of MatMul-free models."""
    if name.startswith("hgrn2-"):
        return HGRN2(size, layer, int(name.removeprefix("hgrn2-")))
    if name == "attention":
        return Attention(size, size // HEAD, linear="ternary", layer=layer)
    if name == "rwkv7":
        return RWKV7(size, layer)
    return Scalar(size, layer, delta=name == "gated-delta")


MIXERS = ("attention", "decay", "gated-delta", "rwkv7", "hgrn2-8", "hgrn2-32")


def replace_mixers(model: Any, name: str, every: int) -> None:
    """Gives each `every`-th layer, the last of each such run, the mixer of this name."""
    for layer, block in enumerate(model.layers):
        if layer % every == every - 1:
            weight = block.mixer_norm.weight
            block.mixer = make_mixer(name, len(weight), layer).to(weight.device)
