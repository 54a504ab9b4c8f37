"""Loads the compiled libraries and knows what is missing and why.

`_C` (C++ and pybind11) registers the CPU kernels when it is imported; `_C_cuda` has no Python module and is loaded into
the dispatcher. Neither is needed: without them the PyTorch reference serves every call.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from . import library

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HERE = Path(__file__).parent


def _load_cpp() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return None, ("is not built: the C++ library latent_engine/kernels/_C is missing "
                      "(install g++ and the Python headers, then `pip install --no-build-isolation -e .`)")
    try:
        from . import _C
    except ImportError as error:
        return None, f"was built but does not load: {error}"
    return _C, None


def _load_cuda() -> str | None:
    path = _HERE / "_C_cuda.so"
    if not path.exists():
        return "is not built: the CUDA library latent_engine/kernels/_C_cuda.so is missing (nvcc was not found at install)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"was built but does not load: {error}"
    return None


cpp, _cpp_missing = _load_cpp()
_cuda_missing = _load_cuda()


def missing(backend: str, primitive: str) -> str | None:
    """Why `backend` has no `primitive` in this process, or None if it has."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton, which is not installed"
        return None if TRITON_INTERPRETED else _no_device()
    reason, key = (_cpp_missing, "CPU") if backend == "cpp" else (_cuda_missing, "CUDA")
    if reason:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{library.NAMESPACE}::{primitive}", key):
        return f"was built before {primitive} was added: build it again"
    return _no_device() if backend == "cuda" else None


def _no_device() -> str | None:
    return None if torch.cuda.device_count() else "needs a CUDA device, and torch sees none"
