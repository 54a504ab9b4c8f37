"""Draws of N(0, 1) that are a function of a key and of their place, the same on every device and in every version.

A key has two 32-bit halves. Draws j = 64 c + 16 w + i come from the counter 16 c + i through Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"), of whose four words r_0 ... r_3 the first two give those of w = 0, 1 and
the others those of w = 2, 3, by the transform of Box and Muller (1958): with u = (r_0 + ½) / 2³² and r_1 = 2³⁰ q + a,

    √(−2 log u) cos θ and √(−2 log u) sin θ,    θ = 2π (q/4 + (a − 2²⁹) / 2³²)

u and a / 2³² are rounded to float32 in both precisions, so that float64 has the draws of float32 in more digits. |draw| < 6.77.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
DRAWS, COUNTERS, ROUNDS = 64, 16, 10


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 bits of a counter of four, as int64 tensors that broadcast against those of the key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = (_product(c, m) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (_low(k + w) for k, w in zip((k0, k1), WEYL, strict=True))
    return c0, c1, c2, c3


def standard_normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draws of N(0, 1) `[*keys.shape, *shape]` from int64 `keys`, those of one key for each."""
    size = math.prod(shape)
    chunks = -(-size // DRAWS)
    block = torch.arange(chunks * COUNTERS, device=keys.device)
    zero = torch.zeros_like(block)
    key = keys[..., None]
    words = philox((_low(block), block >> 32, zero, zero), (_low(key), _low(key >> 32)))
    pairs = [draw for radial, angular in (words[:2], words[2:]) for draw in _box_muller(radial, angular, dtype)]
    draws = torch.stack([draw.unflatten(-1, (chunks, COUNTERS)) for draw in pairs], -2)
    return draws.flatten(-3)[..., :size].reshape(*keys.shape, *shape)


def _box_muller(radial: Tensor, angular: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    u = (radial.float().double() * 2.0**-32 + 2.0**-33).float().to(dtype)
    turn = ((angular & 0x3FFFFFFF) - 2**29).float().to(dtype) * 2.0**-32
    angle = 2 * math.pi * turn
    cosine, sine = angle.cos(), angle.sin()
    quarter, radius = angular >> 30, (-2 * u.log()).sqrt()
    swapped = quarter % 2 == 1
    cosine, sine = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    return (radius * torch.where((quarter == 1) | (quarter == 2), -cosine, cosine),
            radius * torch.where(quarter >= 2, -sine, sine))


def _low(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a product; int64 wraps, and the sign is masked away."""
    product = x * factor
    return _low(product >> 32), _low(product)
