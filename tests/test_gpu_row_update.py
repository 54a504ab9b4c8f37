"""The CUDA kernels of the row updates run on the host through an emulation of blocks; Triton's are among the implementations
of test_row_update.py."""

import ctypes

import pytest
import torch
from test_row_update import DECAYS, adam, batches, dense_adam, dense_adam_oracle, moments, rate, sgd, start
from test_row_update import check as check_state

from latent_engine.kernels import adam_history
from latent_engine.kernels.row_update import catch_up_terms

from emulation import compile_emulation
from oracles.row_update import Table

POINTERS = ("table", "velocity", "mean", "square", "step", "index", "order", "grad", "history")
SIZES = ("count", "D", "table_row", "velocity_row", "mean_row", "square_row", "grad_row", "steps", "now", "terms", "backwards")
SETTINGS = ("lr", "momentum", "beta1", "beta2", "eps", "coupled", "kept")


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]
                + [(name, ctypes.c_double) for name in SETTINGS])


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    library = compile_emulation("row_update", tmp_path_factory.mktemp("cuda"))

    def call(name, index=None, grad=None, velocity=None, backwards=False, weight_decay=0.0, decoupled_weight_decay=False,
             betas=(0.9, 0.999), lr=0.1, momentum=0.0, history=None, now=0, **state):
        """One launch; `backwards` lets the last thread of a block run first."""
        table = state["table"]
        order = None
        if index is not None:
            index, order = index.sort(stable=True)
        tensors = {**state, "velocity": velocity, "index": index, "order": order, "grad": grad, "history": history}
        sizes = {"count": len(table if index is None else index), "D": table.shape[1], "now": now, "backwards": backwards,
                 "steps": 0 if history is None else history.shape[1], "terms": catch_up_terms(betas, torch.float32),
                 **{f"{k}_row": t.stride(0) for k, t in tensors.items() if t is not None and f"{k}_row" in SIZES}}
        decay = (0.0, 1 - lr * weight_decay) if decoupled_weight_decay else (weight_decay, 1.0)
        settings = lr, momentum, *betas, 1e-8, *decay
        pointers = (None if tensors.get(k) is None else tensors[k].data_ptr() for k in POINTERS)
        getattr(library, f"emulate_{name}")(ctypes.byref(Arguments(*pointers, *(sizes.get(k, 0) for k in SIZES), *settings)))

    return call


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 2, 140), (9, 33, 20), (3, 300, 7)], ids=str)  # rows a block, chunks of a row
@pytest.mark.parametrize("decay", DECAYS)
def test_steps(emulate, size, decay, backwards):
    start_, steps, options = start(*size[:2]), batches(*size), DECAYS[decay]
    weight_decay, decoupled = options.get("weight_decay", 0.0), decay == "decoupled"
    for momentum in (0.0, 0.9):
        table, truth, velocity = start_.clone(), Table(start_), torch.zeros_like(start_) if momentum else None
        for index, grad in steps:
            emulate("sgd", index, grad, velocity, backwards, table=table, momentum=momentum, **options)
            truth.sgd(index, grad, 0.1, momentum, weight_decay, decoupled)
        direct = sgd(start_, steps, backend="reference", momentum=momentum, **options)
        check_state("z velocity" if momentum else "z", [table, velocity][: len(direct)], direct, truth, start_)

    table, truth = start_.clone(), Table(start_)
    mean, square, step = moments(table)
    for index, grad in steps:
        emulate("adam", index, grad, backwards=backwards, table=table, mean=mean, square=square, step=step, **options)
        truth.adam(index, grad, 0.1, weight_decay=weight_decay, decoupled=decoupled)
    direct = adam(start_, steps, backend="reference", **options)
    check_state("z mean square step", [table, mean, square, step], direct, truth, start_)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7), (0.0, 0.9), (0.9, 0.5)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_catching_up_is_dense_adam(emulate, betas, weight_decay):
    """A batch with repeated rows each three steps; then all rows. Rows 10 and 11 are never seen."""
    first, steps, options = start(12, 5), batches(10, 5, 6, steps=6), {"betas": betas, "weight_decay": weight_decay}
    table, lrs = first.clone(), []
    mean, square, step = moments(table)
    state = {"table": table, "mean": mean, "square": square, "step": step}
    for index, grad in steps:
        history = adam_history(lrs, 1, **options)
        emulate("catch_up", index, betas=betas, history=history, now=len(lrs), **state)
        emulate("adam", index, grad, lr=rate(len(lrs)), decoupled_weight_decay=True, **options, **state)
        lrs += [rate(t) for t in range(len(lrs), len(lrs) + 3)]
    emulate("catch_up", betas=betas, history=adam_history(lrs, 1, **options), now=len(lrs), **state)
    direct = dense_adam(first, steps, backend="reference", **options)
    check_state("z mean square step", [table, mean, square, step], direct, dense_adam_oracle(first, steps, **options), first)


def test_rows_of_larger_arrays(emulate):
    index, grad = torch.tensor([3, 1, 3, 5]), torch.randn(4, 7, generator=torch.Generator().manual_seed(0))[:, 1:6]
    table, velocity = torch.zeros(6, 11)[:, 3:8].copy_(start(6, 5)), torch.zeros(12, 5)[::2]
    emulate("sgd", index, grad, velocity, table=table, momentum=0.9)
    torch.testing.assert_close([table, velocity], sgd(start(6, 5), [(index, grad)], momentum=0.9, backend="reference"))
    assert table._base.count_nonzero() == 30 and velocity._base.count_nonzero() == 15


def test_a_nan_in_a_gradient_spoils_its_row_only(emulate):
    index, grad = torch.tensor([3, 1, 3, 5]), torch.ones(4, 5)
    grad[2, 1] = torch.nan
    table = start(6, 5)
    mean, square, step = moments(table)
    state = {"table": table, "mean": mean, "square": square, "step": step}
    emulate("adam", index, grad, **state)
    emulate("catch_up", history=adam_history([0.1] * 4, 1), now=4, **state)
    assert table.isnan().nonzero().tolist() == [[3, 1]] and step.tolist() == [4] * 6
