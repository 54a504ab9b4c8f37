"""Set-up shared by all tests.

Without a CUDA device the Triton kernels run in Triton's interpreter, on CPU tensors; it must be asked for before Triton is
imported. Uninitialised tensors from `torch.empty` hold NaN, so that an output a kernel forgot to write shows.
"""

import importlib
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from latent_engine.kernels import native

torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _poison_empty():
    """`torch.empty` fills with NaN in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def implementations() -> list[str]:
    """Ids of everything that can run an op here: each backend, the C++ one at each instruction-set level."""
    names = [f"cpp-{isa}" for isa in native.cpp.cpu_isas()] if native.cpp else []
    if torch.cuda.is_available():
        return [*names, "triton", "cuda"]
    return [*names, "triton"] if native.missing("triton", "gmm_fwd") is None else names


@pytest.fixture(params=implementations())
def implementation(request):
    """(backend, device) of each implementation; the instruction-set level is set for the test."""
    backend, _, isa = request.param.partition("-")
    if isa:
        before = native.cpp.cpu_isa()
        native.cpp.set_cpu_isa(isa)
        yield backend, "cpu"
        native.cpp.set_cpu_isa(before)
    else:
        yield backend, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def pytorch_fid():
    """`pytorch_fid.inception` where pytorch-fid is installed.

    A torchvision built for another PyTorch fails at its operators, of which the networks need none: they are declared then.
    """
    pytest.importorskip("pytorch_fid")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("pytorch_fid.inception")
