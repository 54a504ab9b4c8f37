"""Compiles the CUDA kernels of an op for the host, with coroutines in place of threads (cuda_emulation.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compile_emulation(op: str, folder: Path) -> ctypes.CDLL:
    """`cuda_emulation_<op>.cpp` as a library; skips the test where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / f"{op}.so"
    done = subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas",
                           HERE / f"cuda_emulation_{op}.cpp", "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
