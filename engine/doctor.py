"""What is installed here, which native libraries were found or why not, and which backend serves which op."""

import importlib.metadata
import platform
import textwrap

import torch

from . import __version__
from .kernels import backend_matrix, native
from .kernels.backends import BACKENDS

_PACKAGES = ("triton", "numpy", "safetensors", "tqdm", "tyro", "scikit-learn", "scipy", "matplotlib", "pillow")


def report() -> str:
    """The text of `latent-engine doctor`."""
    sections = [("versions", _versions()), ("cpu", _cpu()), ("gpu", _gpu()), ("native libraries", _libraries())]
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<14}{value}" for name, value in rows), ""]
    lines.append("ops (the automatic choice takes the first that serves the call; the reference serves every call)")
    for op, cells in backend_matrix().items():
        lines.append(f"  {op}")
        lines += [textwrap.fill(cells[backend], 110, initial_indent=f"    {backend:<12}", subsequent_indent=" " * 16)
                  for backend in BACKENDS]
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    rows = [("latent-engine", __version__), ("python", f"{platform.python_version()} on {platform.platform()}"),
            ("torch", torch.__version__)]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _cpu() -> list[tuple[str, str]]:
    rows = [("threads", str(torch.get_num_threads())), ("torch level", torch.backends.cpu.get_cpu_capability())]
    if native.cpp is not None:
        rows.append(("kernel level", f"{native.cpp.cpu_isa()} (available: {', '.join(native.cpp.cpu_isas())}; "
                                     "LATENT_ENGINE_CPU_ISA chooses)"))
    return rows


def _gpu() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return [("cuda", f"torch sees no device (torch is {built})")]
    return [(f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
            for i in range(torch.cuda.device_count()) for p in [torch.cuda.get_device_properties(i)]]


def _libraries() -> list[tuple[str, str]]:
    rows = [("C++", native.missing("cpp", "gmm_fwd") or native.cpp.__file__)]
    if native.cpp is not None:
        rows += [(f"  {key}", str(value)) for key, value in native.cpp.build_info().items()]
    return rows + [(name, native.missing(name.lower(), "gmm_fwd") or "found") for name in ("CUDA", "Triton")]
