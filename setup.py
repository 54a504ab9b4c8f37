"""Builds the native libraries with what the machine has; everything else is in pyproject.toml.

latent_engine/kernels/_C        C++ CPU kernels and a pybind11 module (needs a C++ compiler and Python headers)
latent_engine/kernels/_C_cuda   CUDA kernels (needs nvcc; no GPU and no CUDA build of torch); beside it ptxas's report

Environment: LATENT_ENGINE_CUDA=auto|0|1 (1: a missing nvcc is an error), LATENT_ENGINE_NATIVE=0 (pure Python),
TORCH_CUDA_ARCH_LIST (default: 9.0a and PTX for 9.0), CXX, NVCC.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno",
             "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: one binary serves all later ones


def say(message: str) -> None:
    print(f"latent-engine: {message}", file=sys.stderr, flush=True)


def run_all(commands: list[list[str]]) -> list[str]:
    """Runs the compiler calls in parallel and returns what they print; the first failure stops the build with it."""
    printed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for command, done in zip(commands, pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands),
                                 strict=True):
            if done.returncode:
                sys.exit(f"latent-engine: compiling failed:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
            printed.append(done.stdout + done.stderr)
    return printed


def torch_paths() -> tuple[list[str], str]:
    """Include flags and library folder of the torch that is installed here."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        sys.exit("latent-engine: torch is not importable in the build environment. "
                 "Install torch first, then run pip install with --no-build-isolation.")
    return [f"-I{p}" for p in include_paths()], str(Path(torch.__file__).parent / "lib")


def cuda_arch_flags() -> list[str]:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a 9.0+PTX").replace(";", " ").split()
    flags = []
    for arch in archs:
        number = re.sub(r"[.]|\+PTX", "", arch)
        code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


class NativeBuild(build_ext):
    """Compiles csrc/ where a compiler is found, and says what is missing where none is."""

    def run(self) -> None:
        if os.environ.get("LATENT_ENGINE_NATIVE") == "0":
            say("LATENT_ENGINE_NATIVE=0: installing without native kernels.")
            return
        reason = self.missing_for_cpu()
        if reason:
            say(f"{reason}; installing without the C++ kernels. The PyTorch reference serves every call.")
        else:
            self.build_cpu()
        self.build_cuda()

    def missing_for_cpu(self) -> str | None:
        self.cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if not self.cxx or not shutil.which(self.cxx.split()[0]):
            return "no C++ compiler found (Debian: apt install g++)"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return "the Python headers are missing (Debian: apt install python3-dev)"
        try:
            import pybind11  # noqa: F401
        except ImportError:
            return "pybind11 is not installed in the build environment (pip install pybind11)"
        return None

    def build_cpu(self) -> None:
        import pybind11

        includes, torch_lib = torch_paths()
        includes += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]
        folder = Path(self.build_temp) / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        objects = [str(folder / f"{s.stem}.o") for s in sources]
        run_all([[*self.cxx.split(), *CPU_FLAGS, TARGET, *includes, "-c", str(s), "-o", o]
                 for s, o in zip(sources, objects, strict=True)])
        target = Path(self.get_ext_fullpath("latent_engine.kernels._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        run_all([[*self.cxx.split(), "-shared", *objects, f"-L{torch_lib}", "-ltorch_cpu", "-o", str(target)]])
        say(f"C++ kernels built: {target.name}")

    def build_cuda(self) -> None:
        wanted = os.environ.get("LATENT_ENGINE_CUDA", "auto")
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        if wanted == "0" or not sources:
            return
        if not nvcc:
            if wanted == "1":
                sys.exit("latent-engine: LATENT_ENGINE_CUDA=1, but nvcc was not found. Put it on PATH or set NVCC.")
            say("nvcc not found; installing without the CUDA kernels.")
            return
        includes, torch_lib = torch_paths()
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{s.stem}.o") for s in sources]
        reports = run_all([[nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas=-v", TARGET,
                            *cuda_arch_flags(), *includes, f"-I{ROOT / 'csrc'}", "-c", str(s), "-o", o]
                           for s, o in zip(sources, objects, strict=True)])
        target = Path(self.get_ext_fullpath("latent_engine.kernels._C")).with_name("_C_cuda.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        # --no-as-needed keeps libtorch.so, through which a CUDA build of torch brings the stream shim.
        run_all([[nvcc, "-shared", "--cudart", "static", *objects, f"-L{torch_lib}", "-Xlinker", "--no-as-needed", "-ltorch",
                  "-ltorch_cpu", "-lc10", "-o", str(target)]])
        # Registers and spills of every kernel, which the tests look at.
        target.with_suffix(".log").write_text("\n".join(f"{s.name}\n{r}" for s, r in zip(sources, reports, strict=True)))
        say(f"CUDA kernels built: {target.name}")


setup(ext_modules=[Extension("latent_engine.kernels._C", sources=[])], cmdclass={"build_ext": NativeBuild})
