"""Triton kernels of the general path: float steps around the ternary products, and the products.

Legend: T tokens, D hidden size, K columns of a product, N its rows, C linears that share an input
(3 for i, f, g). RB: bytes of a packed row in device memory, a multiple of 64.

Float steps repeat csrc/kernels/common/float_ops.h operation by operation (launch with
enable_fp_fusion=False: no fused multiply-adds), so results have the bits of the native core; sums
of squares are float64, where the order does not show after rounding to float32.

Quantised activations are stored by planes: element k of a token lies at plane k % 4, place k // 4,
as in the packed byte k // 4. A plane of activations meets (byte >> 2 * plane) & 3 with no shuffle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nomatmul.engine.backends.cuda.device import INTERPRETED

FUSED = tl.constexpr(not INTERPRETED)


@triton.jit
def _exp(x):
    """exp for x in [-88, 88]: exp_poly of csrc/kernels/common/float_vectors.h."""
    biased = x * 1.44269504088896341 + 12582912.0
    n = biased - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    exponent = (biased.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23
    return p * exponent.to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    y = tl.where(x > 88.0, 88.0, x)
    y = tl.where(y < -88.0, -88.0, y)
    e = 1.0 + _exp(-y)
    return tl.where(x < -88.0, 0.0, tl.div_rn(tl.full(e.shape, 1.0, tl.float32), e))


@triton.jit
def _silu(x):
    return x * _sigmoid(x)


@triton.jit
def _divided(x, root):
    """x / root, correctly rounded; root is one number.

    By Markstein's theorem: the reciprocal is correctly rounded and the remainder exact. Where x is
    too small for that, both forms end as the int8 value 0. The interpreter has no fused multiply.
    """
    if FUSED:
        inverse = tl.div_rn(tl.full((), 1.0, tl.float32), root)
        near = x * inverse
        return tl.fma(tl.fma(-near, root, x), inverse, near)
    else:
        return tl.div_rn(x, tl.full(x.shape, 0.0, tl.float32) + root)


@triton.jit
def _root(x, eps, SIZE: tl.constexpr):
    """sqrt(mean(x^2) + eps) of a row whose padding is zero."""
    total = tl.sum((x * x).to(tl.float64), axis=0)
    mean = (total / tl.full((), SIZE, tl.float64)).to(tl.float32)
    return tl.sqrt_rn(mean + eps)


@triton.jit
def _to_int8(z):
    """(int8 values of a row, their step, 0 or NaN where a value is not finite)."""
    bad = tl.sum(z * 0.0, axis=0)  # 0 * inf and 0 * NaN are NaN
    absmax = tl.maximum(tl.max(tl.abs(z), axis=0), 1e-5)
    limit = tl.full((), 127.0, tl.float32)
    v = z * tl.div_rn(limit, absmax)
    # half away from zero: with the float below 0.5, 0.49999997 stays 0 and 0.5 becomes 1
    whole = (v + tl.where(v < 0.0, -0.49999997, 0.49999997)).to(tl.int32)
    whole = tl.minimum(tl.maximum(whole, -128), 127)
    return whole.to(tl.int8), tl.div_rn(absmax, limit), bad


@triton.jit
def _emit(y, eps, w2_ptr, q_ptr, step_ptr, flag_ptr, t, tokens, e, inside, C: tl.constexpr,
          D: tl.constexpr, RB: tl.constexpr):  # fmt: skip
    """Norm and int8 values of one row for each of C linears; padding gets zeros."""
    root = _root(y, eps, D)
    base = _divided(y, root)
    place = (e % 4) * RB + e // 4
    for c in tl.static_range(C):
        z = base * tl.load(w2_ptr + c * D + e, mask=inside, other=0.0)
        whole, step, bad = _to_int8(z)
        row = c * tokens + t
        at = q_ptr + row.to(tl.int64) * (4 * RB) + place
        tl.store(at, whole, mask=e < 4 * RB)
        tl.store(step_ptr + row, step)
        tl.store(flag_ptr, 1, mask=bad != 0.0)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_kernel(
    x_ptr, acc_ptr, acc_step_ptr, w_scale, w1_ptr, eps1, w2_ptr, eps2, q_ptr, step_ptr, flag_ptr,
    tokens, C: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """x += acc * (w_scale * step) if ADD; then, for C linears, norm, their own norms, int8."""
    t = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < D
    at = t.to(tl.int64) * D + e
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        acc = tl.load(acc_ptr + at, mask=inside, other=0)
        x = x + acc.to(tl.float32) * (w_scale * tl.load(acc_step_ptr + t))
        tl.store(x_ptr + at, x, mask=inside)
    if C > 0:
        y = _divided(x, _root(x, eps1, D)) * tl.load(w1_ptr + e, mask=inside, other=0.0)
        _emit(y, eps2, w2_ptr, q_ptr, step_ptr, flag_ptr, t, tokens, e, inside, C, D, RB)


@triton.jit(do_not_specialize=["tokens"])
def gate_norm_kernel(
    g_ptr, h_ptr, w1_ptr, eps1, w2_ptr, eps2, q_ptr, step_ptr, flag_ptr, tokens,
    D: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm(g) * silu(h), then norm and int8 for one linear."""
    t = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < D
    at = t.to(tl.int64) * D + e
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    h = tl.load(h_ptr + at, mask=inside, other=0.0)
    w1 = tl.load(w1_ptr + e, mask=inside, other=0.0)
    y = (_divided(g, _root(g, eps1, D)) * w1) * _silu(h)
    _emit(y, eps2, w2_ptr, q_ptr, step_ptr, flag_ptr, t, tokens, e, inside, 1, D, RB)


@triton.jit(do_not_specialize=["tokens"])
def glu_kernel(
    acc_ptr, acc_step_ptr, w_scale, w2_ptr, eps2, q_ptr, step_ptr, flag_ptr, tokens,
    D: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) * up of accumulators [T, 2 D], then norm and int8; D is the inner size."""
    t = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < D
    at = acc_ptr + t.to(tl.int64) * (2 * D) + e
    scale = w_scale * tl.load(acc_step_ptr + t)
    gate = tl.load(at, mask=inside, other=0).to(tl.float32) * scale
    up = tl.load(at + D, mask=inside, other=0).to(tl.float32) * scale
    y = _silu(gate) * up
    _emit(y, eps2, w2_ptr, q_ptr, step_ptr, flag_ptr, t, tokens, e, inside, 1, D, RB)


@triton.jit(do_not_specialize=["tokens"])
def gates_kernel(
    acc_ptr, out_ptr, step_ptr, w_scale_i, w_scale_f, w_scale_g, bound_ptr, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Accumulators int32 [3, T, D] of i, f, g become, in place, float32 input, forget gate, g."""
    t = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < D
    part = tokens.to(tl.int64) * D
    at = t.to(tl.int64) * D + e
    i = tl.load(acc_ptr + at, mask=inside, other=0).to(tl.float32)
    f = tl.load(acc_ptr + part + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(acc_ptr + 2 * part + at, mask=inside, other=0).to(tl.float32)
    i = i * (w_scale_i * tl.load(step_ptr + t))
    f = f * (w_scale_f * tl.load(step_ptr + tokens + t))
    g = g * (w_scale_g * tl.load(step_ptr + 2 * tokens + t))
    bound = tl.load(bound_ptr + e, mask=inside, other=0.0)
    forget = bound + (1.0 - bound) * _sigmoid(f)
    tl.store(out_ptr + at, _silu(i) * (1.0 - forget), mask=inside)
    tl.store(out_ptr + part + at, forget, mask=inside)
    tl.store(out_ptr + 2 * part + at, g, mask=inside)


@triton.jit
def scan_kernel(
    i_ptr, f_ptr, h_ptr, state_ptr, sequence_ptr, start_ptr, state_stride,
    D: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """h_t = f_t * h_(t-1) + i_t, step by step in order, for one stretch of a sequence.

    A tile of ROWS steps is loaded at once, so that memory is waited for once a tile; the steps
    then run one after the other in registers: any other order would round differently.
    """
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < D
    stretch = tl.program_id(1)
    sequence = tl.load(sequence_ptr + stretch).to(tl.int64)
    first = tl.load(start_ptr + stretch)
    end = tl.load(start_ptr + stretch + 1)
    row = tl.arange(0, ROWS)
    state = tl.load(state_ptr + sequence * state_stride + d, mask=inside, other=0.0)
    start = first
    while start < end:  # the interpreter counts no `for` up to a loaded number
        t = start + row
        live = (t < end)[:, None] & inside[None, :]
        at = t[:, None].to(tl.int64) * D + d[None, :]
        f = tl.load(f_ptr + at, mask=live, other=1.0)  # past the end the state stays as it is
        i = tl.load(i_ptr + at, mask=live, other=0.0)
        h = tl.zeros((ROWS, CHANNELS), tl.float32)
        for u in tl.static_range(ROWS):
            here = (row == u)[:, None]
            decay = tl.sum(tl.where(here, f, 0.0), axis=0)
            state = decay * state + tl.sum(tl.where(here, i, 0.0), axis=0)
            h = tl.where(here, state[None, :], h)
        tl.store(h_ptr + at, h, mask=live)
        start += ROWS
    tl.store(state_ptr + sequence * state_stride + d, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "N"])
def product_kernel(
    q_ptr, w_ptr, acc_ptr, tokens, N, RB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """acc[c, t, n] = sum_k q[c, t, k] * t[c, n, k]: tiles of codes unpacked beside the matrix unit.

    HALF: float16 operands, for chips whose int8 matrix units triton does not serve (7.5). Sums stay
    below 2^24, so float32 holds them exactly.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(2).to(tl.int64)
    kk = tl.arange(0, BK)
    w_at = w_ptr + (c * N + n)[:, None] * RB + kk[None, :]
    q_at = q_ptr + (c * tokens + t)[:, None] * (4 * RB) + kk[None, :]
    n_in, t_in = (n < N)[:, None], (t < tokens)[:, None]
    acc = tl.zeros((BT, BN), tl.float32 if HALF else tl.int32)
    for k in range(0, RB, BK):
        w = tl.load(w_at + k, mask=n_in, other=0x55)
        for plane in tl.static_range(4):
            codes = ((w >> (2 * plane)) & 3).to(tl.int8) - 1
            q = tl.load(q_at + plane * RB + k, mask=t_in, other=0)
            if HALF:
                acc = tl.dot(q.to(tl.float16), tl.trans(codes.to(tl.float16)), acc)
            else:
                acc = tl.dot(q, tl.trans(codes), acc, out_dtype=tl.int32)
    at = acc_ptr + (c * tokens + t)[:, None] * N + n[None, :]
    tl.store(at, acc.to(tl.int32), mask=t_in & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens", "N", "width"])
def matmul_kernel(
    q_ptr, w_ptr, out_ptr, step_ptr, w_scale, tokens, N, width, part, stride, K: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GLU: tl.constexpr,
):  # fmt: skip
    """out[c, t, n] = sum_k q[c, t, k] * w[c, n, k], int8 to int32; K a multiple of BK.

    Rows of out lie `stride` apart, those of a linear begin `part` behind the last one's, and have
    `width` elements. GLU: BN / 2 rows of gate and as many of up take turns in w, and out is float32
    silu(gate) * up. GROUP tiles of tokens go through the rows together, so that both operands stay
    in the cache. Hopper's chips have product.cu instead.
    """
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BN), tl.cdiv(tokens, BT)
    c = (program // (across * down)).to(tl.int64)
    program = program % (across * down)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    t = (first + program % (GROUP * across) % height) * BT + tl.arange(0, BT)
    n0 = program % (GROUP * across) // height * BN
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    q_at = q_ptr + (c * tokens + t % tokens)[:, None] * K + k[None, :]
    w_at = w_ptr + (c * N + n % N)[None, :] * K + k[:, None]
    acc = tl.zeros((BT, BN), tl.int32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(q_at), tl.load(w_at), acc, out_dtype=tl.int32)
        q_at += BK
        w_at += BK
    at = out_ptr + c * part + t[:, None].to(tl.int64) * stride
    if GLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BN // 2)), (0, 2, 1)))
        scale = (w_scale * tl.load(step_ptr + t, mask=t < tokens, other=0.0))[:, None]
        y = _silu(gate.to(tl.float32) * scale) * (up.to(tl.float32) * scale)
        n = n0 // 2 + tl.arange(0, BN // 2)
        tl.store(at + n[None, :], y, mask=(t < tokens)[:, None] & (n < width)[None, :])
    else:
        tl.store(at + n[None, :], acc, mask=(t < tokens)[:, None] & (n < width)[None, :])
