"""Same inputs, same bits: from run to run, at any number of threads, and with AVX2 as with AVX-512."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from latent_engine.kernels import native

needs_avx512 = pytest.mark.skipif(not native.cpp or "avx512" not in native.cpp.cpu_isas(), reason="needs a CPU with AVX-512")


def same_at_any_threads(call: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """What `call` gives, after it gave the same bits again with 1, 2 and 3 threads."""
    first, before = list(call()), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for i, (a, b) in enumerate(zip(call(), first, strict=True)):
                assert torch.equal(a, b), f"output {i} at {threads} threads"
    finally:
        torch.set_num_threads(before)
    return first


def same_at_avx2_and_avx512(call: Callable[[], Iterable[Tensor]]) -> None:
    """`call` gives the same bits at both levels."""
    results = {}
    try:
        for isa in ("avx2", "avx512"):
            native.cpp.set_cpu_isa(isa)
            results[isa] = list(call())
    finally:
        native.cpp.set_cpu_isa("avx512")
    for i, (a, b) in enumerate(zip(results["avx2"], results["avx512"], strict=True)):
        assert torch.equal(a, b), f"output {i}"
