"""The CUDA kernels of mmd2_to_normal run on the host through an emulation of blocks and barriers; Triton's are among the
implementations of test_mmd_normal.py."""

import ctypes
import math

import pytest
import torch
from test_mmd_normal import FEW_NODES, WAE_SCALES, rule, run, sample

from emulation import compile_emulation
from oracles import assert_within_budget
from oracles import mmd_normal as oracle

POINTERS = ("x", "log_var", "rates", "weights", "widths", "values", "dx", "dlog_var", "value")
SIZES = ("N", "D", "x_row", "x_col", "x_type", "log_var_row", "log_var_col", "nodes", "count", "biased", "backwards")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]
                + [(name, ctypes.c_double) for name in ("unit", "prior_variance", "constant")])


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    library = compile_emulation("mmd_normal", tmp_path_factory.mktemp("cuda"))

    def call(x, log_var=None, kernel="imq", scales=WAE_SCALES, estimator="unbiased", gradient=True, backwards=False):
        """The value and, unless `gradient` is false, the gradients; `backwards` lets the last thread of a block run first."""
        (N, D), posteriors = x.shape, log_var is not None
        rates, weights, widths = rule(kernel, scales, not posteriors)
        unit = 2.0 ** -round(math.log2(math.sqrt(D)))
        squared = D * unit**2
        constant = sum(w * (1 + 4 * a / D) ** (-D / 2) for a, w in zip(rates, weights, strict=True))
        tables = [torch.tensor(t) for t in ([a / squared for a in rates], weights, [C * squared for C in widths])]
        values, value = torch.full((N,), torch.nan), torch.tensor(torch.nan)
        grads = [torch.full((N, D), torch.nan) if gradient else None for _ in range(1 + posteriors)]
        pointers = (x, log_var, *tables, values, *(*grads, None)[:2], value)
        library.emulate_forward(ctypes.byref(Arguments(
            *(None if t is None else t.data_ptr() for t in pointers), N, D, *x.stride(), TYPES[x.dtype],
            *(log_var.stride() if posteriors else (0, 0)), len(rates), len(widths), estimator == "biased", backwards, unit,
            squared / D, constant)))
        return [value, *grads] if gradient else [value]

    return call


def check(actual, x, log_var=None, **options):
    """Within the budget of the plain formula in float32."""
    inputs = [t.float() for t in (x, log_var) if t is not None]
    direct = run(inputs, backend="reference", tolerance=FEW_NODES, **options)
    kernel, scales = options.get("kernel", "imq"), options.get("scales", WAE_SCALES)
    exact, sizes = oracle.exact((*inputs, None)[0], (*inputs, None)[1], *rule(kernel, scales, log_var is None),
                                options.get("estimator", "unbiased"))
    for name, a, d, e, s in zip(("value", "x", "log_var"), actual, direct, exact, sizes, strict=False):
        assert_within_budget(name, a, d, e, s)


@pytest.mark.parametrize("size", [(2, 1), (9, 5), (5, 70)], ids=str)  # one and several chunks of 32 dimensions
@pytest.mark.parametrize("kind", ["points", "posteriors"])
@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_values_and_gradients(emulate, size, kind, kernel):
    inputs = sample(kind, *size)
    for estimator in ("unbiased", "biased"):
        options = {"kernel": kernel, "estimator": estimator}
        got = emulate(*inputs, **options)
        check(got, *inputs, **options)
        assert torch.equal(emulate(*inputs, **options, gradient=False)[0], got[0])


@pytest.mark.parametrize(("kind", "kernel"), [("points", "imq"), ("posteriors", "gaussian")])
def test_several_tiles_of_rows(emulate, kind, kernel):
    inputs = sample(kind, 130, 1)
    check(emulate(*inputs, kernel=kernel, scales=(5.0,)), *inputs, kernel=kernel, scales=(5.0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_and_strided(emulate, dtype):
    x, log_var = sample("posteriors", 24, 12)
    x, log_var = x.to(dtype).T.contiguous().T[::2, 3:8], log_var[:12, :1].expand(12, 5)
    check(emulate(x, log_var, backwards=True), x, log_var)


def test_extremes(emulate):
    x, log_var = sample("posteriors", 12, 5)
    x[0], x[2:6] = 1e4, x[6]
    log_var[3], log_var[4], log_var[5, 0] = 30.0, -30.0, 80.0
    for scales in (WAE_SCALES, (1e-4, 1e4)):
        got = emulate(x, log_var, scales=scales)
        assert all(t.isfinite().all() for t in got)
        check(got, x, log_var, scales=scales)
