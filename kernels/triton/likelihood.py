"""Triton kernels of the likelihoods; formulas and notation are in kernels/likelihood.py.

Forward: a program sums one row. Backward: a program takes a block of features through a share of the rows, writes gradients
that have an entry for each, and sums those of broadcast arguments in registers; sums over programs are merged by PyTorch in
float64, in fixed order. exp, log and log(1 + e) are put together from the device's exp and polynomials: its own log is off
by 1e-7 near 1, where a sum of saturated features lives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..likelihood import as_rows

BLOCK = 1024  # features a block
ROWS = 64  # rows whose gradients are summed before they join the float64 sum
NUM_WARPS = 4

HALF_BIN, EDGE, LOG_BIN = tl.constexpr(1 / 255), tl.constexpr(254 / 255), tl.constexpr(-4.848116364598481)  # log(2 / 255)
LOG_2PI = tl.constexpr(1.8378770664093453)
NONE, FULL, BY_FEATURE, ONE = (tl.constexpr(i) for i in range(4))  # what becomes of a gradient


@triton.jit
def _exp(x):
    """e^x for x ≤ 0; tl.exp alone rounds x log2(e), an error of |x| / 2 roundings."""
    x = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.69287109375) - n * 2.7608680994530943e-04
    return tl.exp(r) * ((tl.maximum(n, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _atanh_tail(s):
    """(2 atanh(s) − 2 s) / s for |s| ≤ 1/3, to 2e-8."""
    w = s * s
    p = 2 / 13 * w + 2 / 11
    p = p * w + 2 / 9
    p = p * w + 2 / 7
    p = p * w + 2 / 5
    p = p * w + 2 / 3
    return p * w


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for 0 ≤ e ≤ 1."""
    s = e / (e + 2)
    return s * (_atanh_tail(s) + 2)


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    s = f / (f + 2)
    y = exponent.to(tl.float32) * 0.6931471805599453 + s * (_atanh_tail(s) + 2)
    y = tl.where(x > 0, y, tl.where(x == 0, float("-inf"), float("nan")))
    return tl.where(x == float("inf"), x, y)


@triton.jit
def _one_minus_exp(w):
    """1 − e^−w for w ≥ 0."""
    p = 1 / 5040 - w / 40320
    p = p * w - 1 / 720
    p = p * w + 1 / 120
    p = p * w - 1 / 24
    p = p * w + 1 / 6
    p = p * w - 1 / 2
    return tl.where(w < 0.5, w + w * w * p, 1 - _exp(-w))


@triton.jit
def _log_minus_excess(ratio, excess):
    s = excess / (excess + 2)
    return tl.where(tl.abs(excess) < 0.28, s * (_atanh_tail(s) - excess), _log(ratio) - excess)


@triton.jit
def _normal(ratio):
    """(x + r) / (μ + r) underflows at x = 0 and r ≪ μ, where r log of it still vanishes."""
    return tl.maximum(ratio, 1.1754943508222875e-38)


@triton.jit
def _log_gamma_remainder(z):
    small = z < 1
    t = 1 / tl.where(small, z + 1, z)
    y = 2 * t - 1
    p = 2.222171e-06 * y - 6.8441577e-06
    p = p * y - 1.0825335e-06
    p = p * y + 0.00010094114
    p = p * y - 0.00048512753
    p = p * y - 0.0012300297
    p = p * y + 0.082681395
    return t * p + tl.where(small, (z + 0.5) * _log(1 + 1 / z) - 1, 0.0)


@triton.jit
def _digamma_remainder(z):
    small = z < 1
    t = 1 / tl.where(small, z + 1, z)
    y = 2 * t - 1
    p = -9.868546e-07 * y - 2.2599133e-06
    p = p * y + 1.5650952e-05
    p = p * y - 2.4813664e-05
    p = p * y - 3.8553582e-05
    p = p * y + 0.00039850007
    p = p * y - 0.0011529917
    p = p * y - 0.0034302648
    p = p * y + 0.08145138
    return t * t * p + tl.where(small, 0.5 * (1 / z + t) - _log(1 + 1 / z), 0.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p_unit(_exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = _exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1 + e)


@triton.jit
def _log_density(x, a, b, KIND: tl.constexpr):
    if KIND == 0:
        return x * a - _softplus(a)
    elif KIND == 1:
        t = (x - a) * tl.exp(-0.5 * b)
        return -0.5 * (t * t + b + LOG_2PI)
    elif KIND == 2:
        inverse = tl.exp(-b)
        upper, lower = _softplus(-inverse * (x - a + HALF_BIN)), _softplus(inverse * (x - a - HALF_BIN))
        w = 2 * HALF_BIN * inverse
        inside = tl.where(w < 1e-3, LOG_BIN - b - 0.5 * w, _log(_one_minus_exp(w)))
        return tl.where(x < -EDGE, -upper, tl.where(x > EDGE, -lower, inside - upper - lower))
    else:
        r, positive = tl.exp(b), x > 0
        count = tl.where(positive, x, 1.0)
        u, ratio = (x - a) / (a + r), _normal((x + r) / (a + r))
        own = count * _log_minus_excess(a / count * ratio, -r * u / count)
        gammas = (_log_gamma_remainder(count + r) - _log_gamma_remainder(r) - _log_gamma_remainder(count)
                  - 0.5 * (LOG_2PI - tl.minimum(b, 0.0)
                           + _log(count * (tl.minimum(r, 1.0) + count / tl.maximum(r, 1.0)))))  # count² / r may overflow
        return r * _log_minus_excess(ratio, u) + tl.where(positive, own + gammas, r * u)


@triton.jit
def _gradients(x, a, b, KIND: tl.constexpr):
    """With respect to x, a and b; x where there is none."""
    if KIND == 0:
        e = _exp(-tl.abs(a))
        tail = e / (1 + e)
        return a, tl.where(a > 0, (x - 1) + tail, x - tail), x
    elif KIND == 1:
        inverse = tl.exp(-0.5 * b)
        t = (x - a) * inverse
        return -t * inverse, t * inverse, 0.5 * (t * t) - 0.5
    elif KIND == 2:
        inverse = tl.exp(-b)
        plus, minus = inverse * (x - a + HALF_BIN), inverse * (x - a - HALF_BIN)
        upper, lower = tl.where(x > EDGE, 0.0, _sigmoid(-plus)), tl.where(x < -EDGE, 0.0, _sigmoid(minus))
        w = 2 * HALF_BIN * inverse
        width = tl.where(w < 1e-3, 1 - 0.5 * w, tl.where(w < 80, w * _exp(-w) / _one_minus_exp(w), 0.0))
        edge = (x < -EDGE) | (x > EDGE)
        return x, inverse * (lower - upper), minus * lower - plus * upper - tl.where(edge, 0.0, width)
    else:
        r, positive = tl.exp(b), x > 0
        s = x + r
        u = (x - a) / (a + r)
        d_mean = tl.where(positive, r * u / a, -r / (a + r))
        gammas = 0.5 * x / s + r * (_digamma_remainder(r) - _digamma_remainder(s))
        return x, d_mean, r * _log_minus_excess(_normal(s / (a + r)), u) + tl.where(positive, gammas, 0.0)


@triton.jit
def _load(x, a, b, mask, s, n, p, inside, x_s, x_n, a_s, a_n, b_s, b_n, b_p, m_s, m_n, m_p, KIND: tl.constexpr,
          HAS_MASK: tl.constexpr):
    """x, a, b of one row in float32 and which features count; ones stand in for the others."""
    if HAS_MASK:
        inside = inside & (tl.load(mask + s * m_s + n * m_n + p * m_p, mask=inside, other=0) != 0)
    values = tl.load(x + s * x_s + n * x_n + p, mask=inside, other=1.0).to(tl.float32)
    first = tl.load(a + s * a_s + n * a_n + p, mask=inside, other=1.0).to(tl.float32)
    second = values
    if KIND > 0:
        second = tl.load(b + s * b_s + n * b_n + p * b_p, mask=inside, other=1.0)
    return values, first, second, inside


@triton.jit
def _forward(x, a, b, mask, out, N, P, x_s, x_n, a_s, a_n, b_s, b_n, b_p, m_s, m_n, m_p, KIND: tl.constexpr,
             HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, n = row // N, row % N
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        values, first, second, inside = _load(x, a, b, mask, s, n, p, p < P, x_s, x_n, a_s, a_n, b_s, b_n, b_p, m_s, m_n, m_p,
                                              KIND, HAS_MASK)
        total += tl.where(inside, _log_density(values, first, second, KIND), 0.0)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _store_sum(out, total, chunk, block, p, P, blocks, MODE: tl.constexpr):
    if MODE == BY_FEATURE:
        tl.store(out + chunk * P + p, total, mask=p < P)
    elif MODE == ONE:
        tl.store(out + chunk * blocks + block, tl.sum(total, 0))


@triton.jit
def _backward(x, a, b, mask, grad, out_x, out_a, out_b, S, N, P, x_s, x_n, a_s, a_n, b_s, b_n, b_p, m_s, m_n, m_p, g_s, g_n,
              s_rows, n_rows, n_chunks, MODE_X: tl.constexpr, MODE_A: tl.constexpr, MODE_B: tl.constexpr,
              KIND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = block * BLOCK + tl.arange(0, BLOCK)
    s0, n0 = chunk // n_chunks * s_rows, chunk % n_chunks * n_rows
    sum_x, sum_a, sum_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for s in range(s0, tl.minimum(S, s0 + s_rows)):
        for n in range(n0, tl.minimum(N, n0 + n_rows)):
            values, first, second, inside = _load(x, a, b, mask, s, n, p, p < P, x_s, x_n, a_s, a_n, b_s, b_n, b_p, m_s, m_n,
                                                  m_p, KIND, HAS_MASK)
            g = tl.load(grad + s * g_s + n * g_n)
            d_x, d_a, d_b = _gradients(values, first, second, KIND)
            d_x, d_a, d_b = (tl.where(inside, g * d_x, 0.0), tl.where(inside, g * d_a, 0.0), tl.where(inside, g * d_b, 0.0))
            at = (s * N + n) * P + p
            if MODE_X == FULL:
                tl.store(out_x + at, d_x, mask=p < P)
            if MODE_A == FULL:
                tl.store(out_a + at, d_a.to(out_a.dtype.element_ty), mask=p < P)
            if MODE_B == FULL:
                tl.store(out_b + at, d_b, mask=p < P)
            sum_x += d_x
            sum_a += d_a
            sum_b += d_b
    blocks = tl.num_programs(1)
    _store_sum(out_x, sum_x, chunk, block, p, P, blocks, MODE_X)
    _store_sum(out_a, sum_a, chunk, block, p, P, blocks, MODE_A)
    _store_sum(out_b, sum_b, chunk, block, p, P, blocks, MODE_B)


def block_of(P: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(P, 32)))


class _Call:
    """The arguments that the kernels share; `None` stands for a pointer that is not read."""

    def __init__(self, x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, kind: int) -> None:
        self.S, self.N, self.P = torch.broadcast_shapes(x.shape, a.shape)
        x, a = (t if t.stride(2) == 1 else t.contiguous() for t in (x, a))
        mask = None if mask is None else mask.view(torch.uint8)
        self.tensors = (x, a, b, mask)
        strides = [0 if t is None or t.shape[i] == 1 else t.stride(i) for t in self.tensors for i in range(3)]
        self.strides = (*strides[:2], *strides[3:5], *strides[6:])
        self.block = block_of(self.P)
        self.options = {"KIND": kind, "HAS_MASK": mask is not None, "BLOCK": self.block, "num_warps": NUM_WARPS}


def likelihood_fwd(x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, kind: int, event_dims: int) -> Tensor:
    """The primitive `likelihood_fwd` of kernels/likelihood.py."""
    leading = max(x.dim(), a.dim()) - event_dims
    call = _Call(*as_rows((x, a, b, mask), event_dims), kind)
    out = x.new_empty((call.S, call.N)[2 - leading:])
    if out.numel():
        with torch.cuda.device_of(x):
            _forward[(out.numel(),)](*call.tensors, out, call.N, call.P, *call.strides, **call.options)
    return out


def likelihood_bwd(grad: Tensor, x: Tensor, a: Tensor, b: Tensor | None, mask: Tensor | None, kind: int, event_dims: int,
                   need_x: bool, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The primitive `likelihood_bwd` of kernels/likelihood.py."""
    rows = as_rows((x, a, b, mask), event_dims)
    call = _Call(*rows, kind)
    S, N, P = call.S, call.N, call.P
    grad = grad.expand(S, N) if grad.dim() < 2 else grad
    needed = [t if need else None for t, need in zip(rows, (need_x, need_a, need_b), strict=False)]
    summed = [t for t in needed if t is not None and t.shape != (S, N, P)]
    # Rows go together in a program where no summed gradient has an entry for each of them.
    n_rows = 1 if any(t.shape[1] == N for t in summed) else min(N, ROWS)
    s_rows = 1 if any(t.shape[0] == S for t in summed) else max(1, min(S, ROWS // max(n_rows, 1)))
    s_chunks, n_chunks, blocks = triton.cdiv(S, s_rows), triton.cdiv(N, max(n_rows, 1)), triton.cdiv(P, call.block)
    modes, parts = [], []
    for t in needed:
        if t is None:
            modes.append(NONE), parts.append(None)
        elif t.shape == (S, N, P):
            modes.append(FULL), parts.append(torch.empty_like(t, memory_format=torch.contiguous_format))
        else:
            modes.append(BY_FEATURE if t.shape[2] == P else ONE)
            parts.append(x.new_empty(s_chunks, n_chunks, P if t.shape[2] == P else blocks))
    if S * N * P:
        with torch.cuda.device_of(x):
            _backward[(s_chunks * n_chunks, blocks)](
                *call.tensors, grad, *parts, S, N, P, *call.strides, *grad.stride(), s_rows, n_rows, n_chunks,
                **dict(zip(("MODE_X", "MODE_A", "MODE_B"), modes, strict=True)), **call.options)
    return tuple(x.new_empty(0) if t is None else (part if t.shape == (S, N, P) else _merge(part, t)).view(like.shape)
                 for t, part, like in zip(needed, parts, (x, a, b), strict=True))


def _merge(part: Tensor, like: Tensor) -> Tensor:
    """Sums over chunks and blocks, in float64."""
    return part.double().sum_to_size(like.shape).to(like.dtype) if part.numel() else torch.zeros_like(like)
