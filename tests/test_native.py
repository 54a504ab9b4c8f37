"""The C++ library: accuracy of its exp and log, instruction-set levels, memory of large results, build information."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_engine.kernels import gmm_log_prob, mmd2_to_normal, native, reparametrize

pytestmark = pytest.mark.skipif(not native.cpp, reason="the native library is not built")


@pytest.fixture(params=native.cpp.cpu_isas() if native.cpp else [])
def isa(request):
    before = native.cpp.cpu_isa()
    native.cpp.set_cpu_isa(request.param)
    yield request.param
    native.cpp.set_cpu_isa(before)


def ulps(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact value."""
    spacing = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.longdouble)
    return float((np.abs(actual.astype(np.longdouble) - exact) / spacing).max())


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.float32, -87.3, 88.3), (np.float64, -708.3, 709.4)])
def test_exp_is_within_one_ulp(isa, dtype, low, high):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, high, 400_001), rng.normal(0, 1, 100_000), rng.normal(0, 1e-4, 10_000)]).astype(dtype)
    assert ulps(native.cpp.exp(x), np.exp(x.astype(np.longdouble))) <= 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_is_within_one_ulp(isa, dtype):
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-37, 38, 400_001) if dtype == np.float32 else rng.uniform(-300, 300, 400_001)
    x = np.concatenate([10.0**exponents, rng.uniform(0.5, 2, 100_000), 1 + rng.normal(0, 1e-3, 10_000)]).astype(dtype)
    assert ulps(native.cpp.log(x), np.log(x.astype(np.longdouble))) <= 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(isa, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, inf, nan, 0.0, -1e4, 1e4], dtype)
    np.testing.assert_array_equal(native.cpp.exp(x), np.array([0, inf, nan, 1, 0, inf], dtype))
    x = np.array([0.0, inf, nan, 1.0, -1.0, -inf], dtype)
    np.testing.assert_array_equal(native.cpp.log(x), np.array([-inf, inf, nan, 0, nan, nan], dtype))


def test_arithmetic_counts_the_operations_of_whole_vectors(isa):
    lanes = {"base": 4, "avx2": 8, "avx512": 16}[isa]
    assert [native.cpp.arithmetic(rounds) for rounds in (0, 1, 3)] == [0, 16 * lanes, 48 * lanes]


def test_numbers_below_the_normal_ones_are_pytorchs_again_after_a_call():
    tiny = torch.full((2**18,), 1e-30)
    z = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    gmm_log_prob(4 * z, z, z, z[:, 0], backend="cpp")
    mmd2_to_normal(z, z, backend="cpp")
    assert bool((tiny * 1e-9 > 0).all()) and float(tiny[0]) * 1e-290 > 0


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="unknown instruction-set level 'sse9'; the levels are base, avx2 and avx512"):
        native.cpp.set_cpu_isa("sse9")
    assert native.cpp.cpu_isa() in native.cpp.cpu_isas()


def test_level_from_the_environment():
    code = "from latent_engine.kernels import native; print(native.cpp.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "LATENT_ENGINE_CPU_ISA": "base"},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "base"


def test_build_info_names_compiler_and_abi():
    info = native.cpp.build_info()
    assert info["torch_abi"] == "2.11" and info["compiler"]


def shifted(size: int, value: float) -> torch.Tensor:
    """A result of `size` numbers that are all `value`."""
    zeros = torch.zeros(1, size)
    return reparametrize(zeros + value, zeros, zeros, backend="cpp")[0]


@pytest.mark.parametrize("size", [2**21, 2**23])  # 8 and 32 MB
def test_large_results_lie_where_freed_ones_did(size):
    native.cpp.release_memory()
    first = shifted(size, 1.0)
    second = shifted(size, 2.0)
    place = first.data_ptr()
    assert second.data_ptr() != place
    del first
    third = shifted(size - 1000, 3.0)
    assert third.data_ptr() == place
    assert bool((second == 2).all()) and bool((third == 3).all())


def test_results_without_elements_take_no_large_block():
    native.cpp.release_memory()
    place = shifted(2**21, 1.0).data_ptr()
    zeros = torch.zeros(2, 2**20)
    gradients = torch.ops.latent_engine.pairwise_kl_diversity_fwd(zeros, zeros, False)[1]
    assert gradients.shape == (0, 2, 2**20) and shifted(2**21, 2.0).data_ptr() == place


def test_large_results_of_many_threads_keep_apart():
    def work(thread: int) -> bool:
        mine = [shifted(2**20 + 64 * i, 10.0 * thread + i) for i in range(3)]
        return all(bool((result == 10.0 * thread + i).all()) for i, result in enumerate(mine))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_a_view_of_a_large_result_outlives_it_and_the_release():
    result = shifted(2**20, 5.0)
    native.cpp.release_memory()
    view = result[:, 1:].numpy()
    del result
    shifted(2**20, 6.0)
    assert (view == 5).all()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_released_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

    native.cpp.release_memory()
    shifted(2**24, 1.0)
    kept = resident()
    native.cpp.release_memory()
    assert kept - resident() > 0.9 * 2**26


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the address space from /proc")
def test_running_out_of_memory_is_one_clear_error():
    code = """
import resource, torch
from pathlib import Path
from latent_engine.kernels import reparametrize
x = torch.zeros(1, 2**24)
reparametrize(x, x, x)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
results = []
try:
    for _ in range(8):
        results.append(reparametrize(x, x, x))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out of memory: the system has no 67108864 bytes for a result; smaller batches need less")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the address space from /proc")
def test_copies_and_intermediates_that_do_not_fit_are_the_same_error():
    code = """
import resource, torch
from pathlib import Path
from latent_engine.kernels import importance_bound, mmd2_to_normal
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
for call in (importance_bound, mmd2_to_normal):
    try:
        call(torch.ones(1).expand(2**36, 5))
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, what in zip(done.stdout.splitlines(), ("a contiguous copy of an argument", "intermediates"), strict=True):
        assert re.fullmatch(rf"out of memory: the system has no \d+ bytes for {what}; smaller batches need less", line)
