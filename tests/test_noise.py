"""Noise from keys: the generator's known answers, its distribution, and `reparametrize` with keys on every implementation."""

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from test_reparametrize import incoming, posterior, run

from latent_engine.kernels import BackendError, native, noise_keys, reparametrize
from latent_engine.kernels.reference.noise import philox, standard_normal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
KEYS = torch.tensor([0, -1, 2**63 - 1, 1234567890123456789])
SIZES = [(1, 1), (7, 9), (13, 50), (3, 64), (40, 129)]  # one draw, part of a chunk, rows that straddle chunks, whole ones


def draws(keys: torch.Tensor, N: int, D: int, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """Samples of N(0, 1)."""
    zeros = torch.zeros(N, D, dtype=dtype)
    return reparametrize(zeros, zeros, keys, **options)[0]


# The known answers of philox4x32-10 in Random123, the library of its authors.
@pytest.mark.parametrize(("counter", "key", "words"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_has_the_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))) == words


def test_draws_are_what_numpy_makes_of_the_words():
    """An independent route: Python's integers and NumPy's float64, one counter after the other."""
    key, size = 0x0123456789ABCDEF, 150
    expected = np.empty(192)
    for block in range(48):
        words = philox(tuple(map(torch.tensor, (block, 0, 0, 0))), tuple(map(torch.tensor, (key & 0xFFFFFFFF, key >> 32))))
        r = [int(w) for w in words]
        for pair in range(2):
            u = float(np.float32(np.float32(r[2 * pair]) * 2.0**-32 + 2.0**-33))
            angle = 2 * np.pi * (r[2 * pair + 1] - 2**29) / 2**32
            z = np.sqrt(-2 * np.log(u)) * np.exp(1j * angle)
            at = block // 16 * 64 + 32 * pair + block % 16
            expected[at], expected[at + 16] = z.real, z.imag
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):  # the angle is rounded to float32
        actual = standard_normal(torch.tensor(key), (size,), dtype)
        np.testing.assert_allclose(actual.double().numpy(), expected[:size], rtol=0, atol=tolerance)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
def test_draws_are_normal_and_independent():
    stats = pytest.importorskip("scipy.stats")
    z = draws(torch.arange(64), 1000, 64).double().flatten(1)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    count = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 4 * (variance / count) ** 0.5
    tail = (z.abs() > 4).sum().item()
    assert abs(tail - count * 6.334e-5) < 4 * (count * 6.334e-5) ** 0.5
    for other in (z[:, 1:], z[:, 16:], z[:, 32:], z[:, 64:]):  # neighbours; partners of a pair; words; chunks
        assert abs((z[:, :other.shape[1]] * other).mean()) < 4 / other.numel() ** 0.5
    assert abs(z[:32].flatten().dot(z[32:].flatten())) < 4 * (count / 2) ** 0.5  # keys next to one another


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_implementation_makes_the_same_noise(implementation, size):
    backend, device = implementation
    for dtype in [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]:
        mean, log_var, _ = posterior(4, *size, dtype, device)
        for keys in (KEYS, KEYS[1], KEYS[:1]):
            noise = standard_normal(keys, size, torch.float64).to(device)
            z, kl = reparametrize(mean, log_var, keys, backend=backend)
            expected, expected_kl = reparametrize(mean.double(), log_var.double(), noise, backend="reference")
            assert z.shape == (*keys.shape, *size)
            bound = 8 * torch.finfo(dtype).eps * (mean.abs() + (0.5 * log_var).exp() * (1 + noise.abs()))
            assert ((z.double() - expected).abs() <= bound.double()).all()
            torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_for_the_noise(implementation):
    backend, device = implementation
    for keys in (KEYS, KEYS[0]):
        mean, log_var, _ = posterior(4, 9, 50, device=device)
        noise = standard_normal(keys, (9, 50), torch.float32).to(device)
        grads = incoming([mean, log_var, noise])
        for used in (grads, [grads[0], None], [None, grads[1]]):
            for actual, expected in zip(run([mean, log_var, keys], used, backend=backend),
                                        run([mean, log_var, noise], used, backend=backend), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_is_the_same_with_others_beside_it():
    mean, log_var, _ = posterior(None, 30, 20)
    together, _ = reparametrize(mean, log_var, KEYS)
    for key, z in zip(KEYS, together, strict=True):
        assert torch.equal(reparametrize(mean, log_var, key)[0], z)
    assert torch.equal(reparametrize(mean.reshape(30, 5, 2, 2), log_var.reshape(30, 5, 2, 2), KEYS)[0].flatten(2),
                       together.flatten(1).reshape(4, 30, 20))


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
def test_same_bits_at_any_number_of_threads():
    for size in ((700, 65), (130, 50)):
        inputs = [*posterior(None, *size)[:2], torch.arange(12)]
        noise = standard_normal(inputs[2], size, torch.float32)
        same_at_any_threads(lambda inputs=inputs, noise=noise: run(inputs, incoming([*inputs[:2], noise]), backend="cpp"))


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [draws(KEYS, *size, dtype, backend="cpp") for size in SIZES
                                     for dtype in (torch.float32, torch.float64)])


def test_keys_follow_the_generator():
    first, again = (noise_keys(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.unique().numel() == 5
    assert noise_keys().shape == () and not torch.equal(noise_keys(5), noise_keys(5))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (7,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_noise_the_default_generator_draws_it(backend, shape, dtype):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    mean, log_var = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    results = []
    for draw in (lambda: None, noise_keys):
        torch.manual_seed(3)
        z, kl = reparametrize(mean, log_var, draw(), backend=backend)
        results.append((z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), (mean, log_var)), torch.randn(2)))
    for drawn, given in zip(*results, strict=True):
        assert torch.equal(drawn, given)
    with torch.no_grad():
        z, _ = reparametrize(mean, log_var, backend=backend)
    assert z.shape == shape and not z.requires_grad and not torch.equal(z, results[0][0])


def test_a_graph_keeps_each_draw_for_its_gradient():
    mean, log_var = torch.zeros(2, 5, 4, requires_grad=True)
    one, other = (reparametrize(mean, log_var)[0] for _ in range(2))
    assert not torch.equal(one, other)
    for z in (one, other):  # z = ε e^{v/2} at mean 0, of which ∂z/∂v is z / 2
        torch.testing.assert_close(torch.autograd.grad(z.sum(), log_var)[0], z / 2)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_once_and_twice(backend):
    if backend == "cpp" and not native.cpp:
        pytest.skip("the native library is not built")
    leaves = [t.detach().requires_grad_() for t in posterior(None, 2, 3, torch.float64)[:2]]
    f = lambda *leaves: reparametrize(*leaves, KEYS[:2], backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
@pytest.mark.parametrize("keys", [KEYS, KEYS[0]], ids=["samples", "one"])
def test_opcheck(keys):
    ops, (mean, log_var, _) = torch.ops.latent_engine, posterior(None, 5, 3)
    torch.library.opcheck(ops.reparametrize_fwd.default, (mean.requires_grad_(), log_var, keys))
    grad_z = torch.ones(*keys.shape, 5, 3)
    torch.library.opcheck(ops.reparametrize_bwd.default, (grad_z, None, mean.detach(), log_var, keys, True, True))


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
def test_opcheck_of_the_one_that_draws():
    for grad in (False, True):
        leaves = [t.detach().requires_grad_(grad) for t in posterior(None, 5, 3)[:2]]
        torch.library.opcheck(torch.ops.latent_engine.reparametrize_drawn_fwd.default, leaves,
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_draws_in_a_compiled_graph_and_under_vmap():
    mean, log_var, _ = posterior(None, 6, 3)
    compiled = torch.compile(reparametrize, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(mean, log_var)[0], compiled(mean, log_var)[0])
    means = torch.stack((mean, mean + 1))
    z, _ = torch.func.vmap(reparametrize, (0, None), randomness="same")(means, log_var)
    torch.testing.assert_close(z[1], z[0] + 1)


def test_compiles_to_one_graph_and_maps():
    compiled = torch.compile(reparametrize, fullgraph=True, backend="aot_eager")
    mean, log_var, _ = posterior(None, 6, 3)
    for keys in (KEYS, KEYS[0]):
        torch.testing.assert_close(compiled(mean, log_var, keys), reparametrize(mean, log_var, keys))
        means = torch.stack((mean, mean + 1))
        expected = [reparametrize(m, log_var, keys) for m in means]
        actual = torch.func.vmap(reparametrize, (0, None, None))(means, log_var, keys)
        for a, *parts in zip(actual, *expected, strict=True):
            torch.testing.assert_close(a, torch.stack(parts))


@pytest.mark.parametrize(("keys", "error", "message"), [
    (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"int64 keys of shape \[\] or \[S\]; given \[2, 2\] of torch.int64"),
    (torch.zeros(4, 3, dtype=torch.int64), ValueError, r"int64 keys of shape \[\] or \[S\]; given \[4, 3\] of torch.int64"),
    (torch.zeros(2, dtype=torch.int32), TypeError, "noise is torch.int32 but log_var is torch.float32"),
    (7, TypeError, "noise must be a tensor, given int"),
])
def test_mistakes_get_one_clear_error(keys, error, message):
    with pytest.raises(error, match=message):
        reparametrize(torch.zeros(4, 3), torch.zeros(4, 3), keys)
    with pytest.raises(BackendError, match="'cuda' was asked for"):
        reparametrize(torch.zeros(4, 3), torch.zeros(4, 3), KEYS, backend="cuda")


@pytest.mark.parametrize("size", [(0, 3), (3, 0)], ids=str)
def test_empty_sizes(implementation, size):
    backend, device = implementation
    zeros = torch.zeros(size, device=device)
    assert reparametrize(zeros, zeros, KEYS, backend=backend)[0].shape == (4, *size)
    assert reparametrize(zeros[:1], zeros[:1], KEYS[:0], backend=backend)[0].shape == (0, *zeros[:1].shape)
