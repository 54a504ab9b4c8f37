"""row_sgd_, row_adam_ and row_catch_up_: every implementation against dense steps in 80-bit arithmetic, on odd inputs."""

import numpy as np
import pytest
import torch
from bits import needs_avx512, same_at_any_threads, same_at_avx2_and_avx512
from torch import Tensor

from latent_engine.kernels import BackendError, adam_history, explain, native, row_adam_, row_catch_up_, row_sgd_
from latent_engine.kernels.row_update import catch_up_terms

from oracles import assert_within_budget
from oracles.row_update import Table

# N, D, B: one element, few and many rows of few elements, broken and whole vectors, more gradients than rows
SIZES = [(1, 1, 1), (5, 2, 32), (90, 33, 20), (40, 64, 40), (3, 130, 7)]
STEPS = 4
DECAYS = {"none": {}, "coupled": {"weight_decay": 0.1}, "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True}}


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if backend == "cpp" else [torch.float32]


def batches(N: int, D: int, B: int, dtype=torch.float32, device="cpu", steps=STEPS, seed=0) -> list[tuple[Tensor, Tensor]]:
    """Rows, some more than once, and their gradients."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(N, (B,), generator=g).to(device), torch.randn(B, D, generator=g).to(device, dtype))
            for _ in range(steps)]


def start(N: int, D: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(9)).to(device, dtype)


def moments(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(table), torch.zeros_like(table), torch.zeros(len(table), dtype=torch.int32, device=table.device)


def sgd(table: Tensor, steps, **options) -> list[Tensor]:
    table, velocity = table.clone(), torch.zeros_like(table) if options.get("momentum") else None
    for index, grad in steps:
        row_sgd_(table, velocity, index, grad, lr=0.1, **options)
    return [table] if velocity is None else [table, velocity]


def adam(table: Tensor, steps, **options) -> list[Tensor]:
    table = table.clone()
    state = moments(table)
    for index, grad in steps:
        row_adam_(table, *state, index, grad, lr=0.1, **options)
    return [table, *state]


def dense_adam(table: Tensor, steps, every: int = 3, betas=(0.9, 0.999), weight_decay=0.0, **options) -> list[Tensor]:
    """Dense Adam by catching up: the rows of a batch before its step, all rows at the end; a batch each `every` steps.

    The learning rate changes at each step."""
    table = table.clone()
    state, lrs = moments(table), []
    for index, grad in steps:
        history = adam_history(lrs, 1, betas, weight_decay).to(table.device)
        row_catch_up_(table, *state, index, history, now=len(lrs), betas=betas, **options)
        row_adam_(table, *state, index, grad, lr=rate(len(lrs)), betas=betas, weight_decay=weight_decay,
                  decoupled_weight_decay=True, **options)
        lrs += [rate(t) for t in range(len(lrs), len(lrs) + every)]
    history = adam_history(lrs, 1, betas, weight_decay).to(table.device)
    row_catch_up_(table, *state, None, history, now=len(lrs), betas=betas, **options)
    return [table, *state]


def rate(t: int) -> float:
    return 0.1 / (1 + t % 3)


def dense_adam_oracle(table: Tensor, steps, every: int = 3, betas=(0.9, 0.999), weight_decay=0.0) -> Table:
    truth, t = Table(table), 0
    for index, grad in steps:
        for i in range(every):
            truth.adam(index, grad * (i == 0), rate(t), betas, weight_decay=weight_decay, decoupled=True, dense=True)
            t += 1
    return truth


def check(names: str, actual, direct, truth: Table, table: Tensor) -> None:
    """State is within the error budget; what is below the smallest normal number may be 0."""
    least = torch.finfo(table.dtype).tiny / torch.finfo(table.dtype).eps
    size = np.abs(table.cpu().double().numpy()) + np.abs(truth.z).astype(float)
    for name, a, d in zip(names.split(), actual, direct, strict=True):
        if name == "step":
            assert np.array_equal(a.cpu().numpy(), truth.step) and a.dtype == torch.int32
        else:
            exact = getattr(truth, name)
            assert_within_budget(name, a, d, exact, size if name == "z" else np.abs(exact) + least)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-D{s[1]}-B{s[2]}")
@pytest.mark.parametrize("decay", DECAYS)
def test_sgd(implementation, size, decay):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        table, steps = start(*size[:2], dtype, device), batches(*size, dtype, device)
        for momentum in (0.0, 0.9):
            options, truth = {"momentum": momentum, **DECAYS[decay]}, Table(table)
            for index, grad in steps:
                truth.sgd(index.cpu(), grad, 0.1, momentum, options.get("weight_decay", 0.0), decay == "decoupled")
            direct = sgd(table, steps, backend="reference", **options)
            check("z velocity" if momentum else "z", sgd(table, steps, backend=backend, **options), direct, truth, table)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-D{s[1]}-B{s[2]}")
@pytest.mark.parametrize("decay", DECAYS)
def test_lazy_adam(implementation, size, decay):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        table, steps, truth = start(*size[:2], dtype, device), batches(*size, dtype, device), None
        truth = Table(table)
        for index, grad in steps:
            truth.adam(index.cpu(), grad, 0.1, weight_decay=DECAYS[decay].get("weight_decay", 0.0),
                       decoupled=decay == "decoupled")
        direct = adam(table, steps, backend="reference", **DECAYS[decay])
        check("z mean square step", adam(table, steps, backend=backend, **DECAYS[decay]), direct, truth, table)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7), (0.5, 0.9), (0.0, 0.9), (0.9, 0.0), (0.9, 0.5)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_catching_up_is_dense_adam(implementation, betas, weight_decay):
    backend, device = implementation
    for dtype in dtypes_of(backend):
        table, steps = start(12, 5, dtype, device), batches(10, 5, 3, dtype, device, steps=6)  # two rows are never seen
        options = {"betas": betas, "weight_decay": weight_decay}
        truth = dense_adam_oracle(table, [(i.cpu(), g) for i, g in steps], **options)
        direct = dense_adam(table, steps, backend="reference", **options)
        check("z mean square step", dense_adam(table, steps, backend=backend, **options), direct, truth, table)


def test_catching_up_ends_where_the_rest_is_below_rounding(implementation):
    """Three times as many steps as have terms in the sum."""
    backend, device = implementation
    for dtype in dtypes_of(backend):
        table, steps = start(6, 3, dtype, device), batches(6, 3, 2, dtype, device, steps=2)
        every = 3 * catch_up_terms((0.9, 0.999), dtype) if backend == "cpp" else 250
        truth = dense_adam_oracle(table, [(i.cpu(), g) for i, g in steps], every)
        direct = dense_adam(table, steps, every, backend="reference")
        check("z mean square step", dense_adam(table, steps, every, backend=backend), direct, truth, table)


def test_rows_outside_the_batch_are_untouched(implementation):
    backend, device = implementation
    table, steps = start(50, 7, device=device), batches(25, 7, 30, device=device)
    for run in (sgd, adam):
        options = {"momentum": 0.9, "weight_decay": 0.1} if run is sgd else {"weight_decay": 0.1}
        after = run(table, steps, backend=backend, **options)
        assert torch.equal(after[0][25:], table[25:]) and all((state[25:] == 0).all() for state in after[1:])


def test_the_order_of_distinct_rows_changes_no_bit(implementation):
    backend, device = implementation
    index, grad = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(device), start(70, 9, device=device)
    table = start(70, 9, device=device)
    for run in (sgd, adam):
        sorted_first = run(table, [(torch.arange(70, device=device), grad[index.argsort()])], backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(run(table, [(index, grad)], backend=backend), sorted_first, strict=True))


def test_every_gradient_on_one_row(implementation):
    backend, device = implementation
    table, grad = start(1000, 5, device=device), torch.full((300, 5), 0.25, device=device)
    index = torch.full((300,), 777, device=device)
    (after,) = sgd(table, [(index, grad)], backend=backend)
    torch.testing.assert_close(after[777], table[777] - 0.1 * 75)


def test_rows_far_apart_in_a_large_table():
    """Row numbers of more than two digits of the radix sort."""
    N = 9_000_000
    table, index = torch.zeros(N, 1), torch.tensor([8_999_999, 3, 4_194_304, 8_999_999, 2_048, 3, 4_194_303])
    row_sgd_(table, None, index, torch.arange(1.0, 8.0)[:, None], lr=1.0)
    assert table.nonzero()[:, 0].tolist() == [3, 2_048, 4_194_303, 4_194_304, 8_999_999]
    assert table[index, 0].tolist() == [-5.0, -8.0, -3.0, -5.0, -5.0, -8.0, -7.0]


def test_no_rows(implementation):
    backend, device = implementation
    none, no_grad = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 3, device=device)
    for table in (start(4, 3, device=device), start(0, 3, device=device)):
        for run in (sgd, adam, dense_adam):
            assert torch.equal(run(table, [(none, no_grad)], backend=backend)[0], table)


def test_a_nan_in_a_gradient_spoils_its_row_only(implementation):
    backend, device = implementation
    table, ((index, grad), *rest) = start(8, 3, device=device), batches(8, 3, 6, device=device)
    spoilt = grad.clone()
    spoilt[2, 1] = torch.nan
    for run in (sgd, adam, dense_adam):
        clean, dirty = (run(table, [(index, g), *rest], backend=backend)[0] for g in (grad, spoilt))
        is_spoilt = torch.zeros_like(table, dtype=torch.bool)
        is_spoilt[index[2], 1] = True
        assert torch.equal(dirty.isnan(), is_spoilt)
        assert torch.equal(dirty[~is_spoilt], clean[~is_spoilt])


def test_strided_arguments(implementation):
    """Tables that are parts of larger ones, transposed, expanded and int32 arguments."""
    backend, device = implementation
    index, grad = torch.tensor([[3, 0], [1, 0], [3, 0], [5, 0]], device=device)[:, 0], start(5, 4, device=device).mT
    expected = sgd(start(6, 5, device=device), [(index.clone(), grad.contiguous())], momentum=0.9, backend="reference")
    for wide in (lambda t: torch.zeros(6, 11, device=device).narrow(1, 3, 5).copy_(t),
                 lambda t: torch.zeros(12, 5, device=device)[::2].copy_(t)):
        table, velocity = wide(start(6, 5, device=device)), wide(torch.zeros(6, 5, device=device))
        row_sgd_(table, velocity, index.int(), grad, lr=0.1, momentum=0.9, backend=backend)
        torch.testing.assert_close([table, velocity], expected)
        assert table._base.count_nonzero() == table.numel()
    table = start(6, 5, device=device)
    row_sgd_(table, None, index, torch.ones((), device=device).expand(4, 5), lr=1.0, backend=backend)
    moved = (start(6, 5, device=device) - table).sum(1).cpu()
    torch.testing.assert_close(moved, torch.tensor([0.0, 5.0, 0.0, 10.0, 0.0, 5.0]))


def test_same_bits_every_time_at_any_number_of_threads(implementation):
    backend, device = implementation
    size = (40, 6, 60) if backend == "triton" and device == "cpu" else (5000, 40, 3000)
    table, steps = start(*size[:2], device=device), batches(*size, device=device, steps=2)
    same_at_any_threads(lambda: [t for run in (sgd, adam, dense_adam) for t in run(table, steps, backend=backend)])


@needs_avx512
def test_avx2_and_avx512_agree_bit_for_bit():
    same_at_avx2_and_avx512(lambda: [
        t for size in SIZES for dtype in (torch.float32, torch.float64) for run in (sgd, adam, dense_adam)
        for t in run(start(*size[:2], dtype), batches(*size, dtype), backend="cpp", weight_decay=0.1)])


@pytest.mark.skipif(not native.cpp, reason="the native library is not built")
def test_opcheck():
    ops, table = torch.ops.latent_engine, start(6, 3)
    (index, grad), = batches(6, 3, 4, steps=1)
    torch.library.opcheck(ops.row_sgd_.default, (table, None, index, None, grad, 0.1, 0.0, 0.1, True))
    torch.library.opcheck(ops.row_sgd_.default, (table, table.clone(), index, None, grad, 0.1, 0.9, 0.0, False))
    state = (table, *moments(table))
    torch.library.opcheck(ops.row_adam_.default, (*state, index, None, grad, 0.1, 0.9, 0.999, 1e-8, 0.0, False))
    for rows in (index, None):
        torch.library.opcheck(ops.row_catch_up_.default, (*state, rows, adam_history([0.1] * 3, 1), 3, 0.9, 0.999, 1e-8, 5))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    torch._dynamo.reset()

    def step(table, mean, square, count, index, grad):
        row_adam_(table, mean, square, count, index, 2 * grad, lr=0.1)
        return table.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for B in (4, 7):
        (index, grad), = batches(6, 3, B, steps=1)
        expected, table = start(6, 3), torch.nn.Parameter(start(6, 3))
        states = moments(expected), moments(expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(table, *states[0], index, grad), step(expected, *states[1], index, grad))
        torch.testing.assert_close([table.detach(), *states[0]], [expected, *states[1]])


def test_a_graph_that_needs_the_old_rows_notices(implementation):
    backend, device = implementation
    table = start(4, 2, device=device).requires_grad_()
    value = table.square().sum()
    row_sgd_(table, None, torch.tensor([1], device=device), torch.ones(1, 2, device=device), lr=0.1, backend=backend)
    assert table.requires_grad and table.is_leaf and table.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


GOOD = {"table": torch.zeros(4, 3), "velocity": torch.zeros(4, 3), "index": torch.tensor([0, 2]), "grad": torch.ones(2, 3),
        "lr": 0.1}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"index": torch.tensor([0, 4])}, ValueError, r"index must lie in \[0, 4\), given values from 0 to 4"),
    ({"index": torch.tensor([0, -1])}, ValueError, r"index must lie in \[0, 4\), given values from -1 to 0"),
    ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index must be a tensor of integers, given torch.float32"),
    ({"index": [0, 1]}, TypeError, "index must be a tensor of integers, given list"),
    ({"index": torch.tensor([[0, 1]])}, ValueError, r"index must have shape \[B\], given \[1, 2\]"),
    ({"index": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "index is on meta but table is on cpu"),
    ({"grad": torch.ones(3, 3)}, ValueError, r"grad must have shape \[B, D\] .* = \[2, 3\], given \[3, 3\]"),
    ({"grad": torch.ones(2, 3).double()}, TypeError, "grad is torch.float64 but table is torch.float32"),
    ({"grad": torch.ones(2, 3, device="meta")}, ValueError, "grad is on meta but table is on cpu"),
    ({"table": torch.zeros(12)}, ValueError, r"table must have shape \[N, D\], given \[12\]"),
    ({"table": torch.zeros(4, 3).half()}, TypeError, "velocity is torch.float32 but table is torch.float16"),
    ({"table": torch.zeros(4, 3).half(), "velocity": None}, TypeError, "must be float32 or float64, given torch.float16"),
    ({"table": torch.zeros(4, 3).int()}, TypeError, "table must be a floating-point tensor, given torch.int32"),
    ({"table": torch.zeros(3, 4).mT}, ValueError, r"elements of a row of table must lie next to .* strides \(1, 4\)"),
    ({"velocity": torch.zeros(1, 3).expand(4, 3)}, ValueError, r"row of velocity must lie next to .* strides \(0, 1\)"),
    ({"velocity": torch.zeros(4, 2)}, ValueError, r"velocity must have shape \[N, D\] as of table = \[4, 3\]"),
    ({"velocity": None, "momentum": 0.9}, ValueError, "a momentum of 0.9 needs a velocity"),
    ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, given -1.0"),
    ({"momentum": float("nan")}, ValueError, "momentum must be at least 0 and finite, given nan"),
    ({"backend": "fast"}, BackendError, "Unknown backend 'fast'"),
])
def test_mistakes_get_one_clear_error_and_nothing_is_written(changes, error, message):
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=message):
        row_sgd_(**arguments)
    assert (GOOD["table"] == 0).all() and (GOOD["velocity"] == 0).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"step": torch.zeros(4)}, r"step must be contiguous int32 \[N\] = \[4\] on cpu, given torch.float32 \[4\]"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), given \(0.9, 1.0\)"),
    ({"eps": -1.0}, "eps must be at least 0"),
    ({"history": torch.zeros(3, 2)}, r"history must be float64 \[3, H\] on cpu, given torch.float32 \[3, 2\]"),
    ({"now": 9}, r"step must lie in \[7, 10\), given values from 0 to 0"),  # a history that does not reach back far enough
    ({"index": torch.tensor([5])}, r"index must lie in \[0, 4\)"),
])
def test_mistakes_in_catching_up(changes, message):
    table = torch.zeros(4, 3)
    mean, square, step = moments(table)
    arguments = {"step": step, "index": None, "history": adam_history([0.1, 0.1], 1), "now": 2, **changes}
    with pytest.raises(ValueError, match=message):
        row_catch_up_(table, mean, square, **arguments)


def test_no_history_of_more_decay_than_there_is():
    with pytest.raises(ValueError, match=r"lr · weight_decay must be below 1, given 0.5 · 2.0"):
        adam_history([0.1, 0.5], 1, weight_decay=2.0)


def test_explain_names_the_backend_of_the_table():
    reasons = explain(row_sgd_, **GOOD)
    assert reasons["cpp" if native.cpp else "reference"] == "chosen"
    assert "float32, torch.float64, given torch.float16" in explain(row_adam_, torch.zeros(4, 3).half())["cpp"]
