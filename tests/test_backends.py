"""Backend choice: argument, block, process, environment, automatic; and what `explain` says of it."""

import os
import subprocess
import sys

import pytest
import torch

from latent_engine.kernels import BackendError, backend_matrix, explain, gmm_log_prob, native, set_backend, use_backend
from latent_engine.kernels.backends import BACKENDS, Op, Support

needs_cpp = pytest.mark.skipif(not native.cpp, reason="the native library is not built")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
ARGS = (torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5))


def chosen(*args, **kwargs) -> str:
    return next(name for name, reason in explain(gmm_log_prob, *args, **kwargs).items() if reason == "chosen")


@needs_cpp
def test_order_of_choice():
    assert chosen(*ARGS) == "cpp"
    with use_backend("reference"):
        assert chosen(*ARGS) == "reference"
        assert chosen(*ARGS, backend="cpp") == "cpp"
        with use_backend(None):
            assert chosen(*ARGS) == "cpp"
        assert chosen(*ARGS) == "reference"
    set_backend("reference")
    try:
        assert chosen(*ARGS) == "reference"
    finally:
        set_backend(None)
    assert chosen(*ARGS) == "cpp"


@needs_cpp
def test_automatic_choice_keeps_to_the_limits_of_a_backend():
    narrow, dtypes = Support(("cpu",), (torch.float32,), max_dim=2), (torch.float32, torch.float64)
    limited = Op("limited", "gmm_fwd", {"cpp": narrow})
    assert [limited.choose(torch.zeros(4, D)) for D in (2, 3)] == ["cpp", "reference"]
    first = Op("first", "gmm_fwd", {"cpp": Support(("cpu",), dtypes), "cuda": narrow})
    second = Op("second", "gmm_fwd", {"cuda": Support(("cuda",), dtypes), "cpp": Support(("cpu",), dtypes, max_scales=1)})
    assert first.choose(torch.zeros(4, 3)) == "cpp"
    assert [second.choose(torch.zeros(4, 3), scales=n) for n in (1, 2)] == ["cpp", "reference"]


def test_explain_takes_the_arguments_of_the_call():
    named = dict(zip(("z", "means", "log_vars", "log_weights"), ARGS, strict=True))
    assert explain(gmm_log_prob, **named) == explain("gmm_log_prob", ARGS[0], **dict(list(named.items())[1:]))
    with pytest.raises(TypeError, match="needs the arguments of a call of gmm_log_prob, tensors among them; given none"):
        explain(gmm_log_prob, 3.0)


def test_block_restores_the_choice_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert explain(gmm_log_prob, *ARGS)["reference"] != "chosen" or not native.cpp


def test_automatic_choice_falls_back_and_says_why():
    reasons = explain(gmm_log_prob, *(t.to("meta") for t in ARGS))
    assert reasons["reference"] == "chosen"
    assert gmm_log_prob(*(t.to("meta") for t in ARGS)).device.type == "meta"
    if native.cpp:
        assert reasons["cpp"] == "serves cpu tensors, given a meta tensor"


@needs_cpp
def test_explain_agrees_with_the_call_on_half_precision():
    half = ARGS[0].bfloat16()
    assert chosen(half, *ARGS[1:]) == "cpp"
    torch.testing.assert_close(gmm_log_prob(half, *ARGS[1:], backend="cpp"), gmm_log_prob(*ARGS, backend="reference"))


@needs_no_cuda
def test_forced_backend_is_strict():
    with use_backend("cuda"), pytest.raises(BackendError, match="gmm_log_prob: the backend 'cuda' was asked for, but it"):
        gmm_log_prob(*ARGS)


def test_unknown_backend():
    for call in (lambda: set_backend("cudnn"), lambda: gmm_log_prob(*ARGS, backend="cudnn")):
        with pytest.raises(BackendError, match="Unknown backend 'cudnn'; the backends are cpp, cuda, triton, reference"):
            call()
    with pytest.raises(ValueError, match="Unknown op 'softmax'"):
        explain("softmax", ARGS[0])


def test_matrix_has_a_cell_for_every_backend():
    for row in backend_matrix().values():
        assert set(row) == set(BACKENDS) and all(row.values())


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_environment_variable():
    code = ("import torch; from latent_engine.kernels import explain, gmm_log_prob as f;"
            "z = torch.zeros(2, 1); print(explain(f, z, z, z, z[:, 0])['reference'])")
    assert run(code, LATENT_ENGINE_BACKEND="reference").stdout.strip() == "chosen"
    assert "Unknown backend 'fastest'" in run(code, LATENT_ENGINE_BACKEND="fastest").stderr


def test_works_without_the_native_libraries(tmp_path):
    """A pure-Python copy of the package computes with the reference and says what is missing."""
    code = f"""
import importlib.util, sys, torch
sys.modules['latent_engine.kernels._C'] = None
import pathlib, shutil
source = pathlib.Path({str(os.path.dirname(native.__file__))!r})
shutil.copytree(source, {str(tmp_path / 'pure')!r}, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
sys.path.insert(0, {str(tmp_path)!r})
from pure import explain, gmm_log_prob
z = torch.zeros(2, 1)
print(gmm_log_prob(z, z, z, z[:, 0]).tolist())
print(explain(gmm_log_prob, z, z, z, z[:, 0])['cpp'])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    value, reason = done.stdout.strip().splitlines()
    assert value.startswith("[-0.2257") and "is not built" in reason
