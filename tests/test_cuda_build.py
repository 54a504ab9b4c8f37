"""The CUDA library as the install built it, and what its kernels need of the device; no GPU is used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_engine.kernels import native

LIBRARY = Path(native.__file__).with_name("_C_cuda.so")
SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))

built = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without the CUDA library")


@pytest.fixture(scope="module")
def undefined_symbols():
    """(kind, name) of what the library leaves to be found at load; kind "w" is weak."""
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    lines = subprocess.run(["nm", "-uD", LIBRARY], capture_output=True, text=True, check=True).stdout.splitlines()
    return [tuple(line.split()) for line in lines]


@built
def test_library_registers_every_primitive_in_a_fresh_process():
    program = ("import torch; from latent_engine.kernels import native; assert native._cuda_missing is None, "
               "native._cuda_missing; names = [s.name for s in torch._C._jit_get_all_schemas() "
               "if s.name.startswith('latent_engine::') and '::triton_' not in s.name]; "
               "assert 'latent_engine::gmm_fwd' in names; "
               "print([n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, 'CUDA')])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['latent_engine::reparametrize_drawn_fwd']"  # the one that is of the CPU's generator


@built
def test_library_uses_only_the_stable_interface_of_torch(undefined_symbols):
    headers = [Path(torch.__file__).parent / "include/torch/csrc" / h
               for h in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")]
    text = re.sub(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_1[2-9].*?#endif // TORCH_FEATURE_VERSION", "",
                  "".join(h.read_text() for h in headers), flags=re.DOTALL)  # what torch 2.11 does not have yet
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", text))
    names = [name.split("@")[0] for _, name in undefined_symbols]
    assert not [n for n in names if re.match(r"_ZNK?(2at|3c10|5torch)", n)]
    used = {n for n in names if n.startswith(("torch_", "aoti_torch_"))}
    assert used, "the library registers nothing with torch"
    assert used <= declared
    assert not [n for n in names if n.startswith("cuda")], "the CUDA runtime must be linked statically"


@built
def test_only_the_stream_of_a_cuda_torch_is_optional(undefined_symbols):
    weak = {name for kind, name in undefined_symbols if kind == "w" and "torch" in name}
    assert weak == {"aoti_torch_get_current_cuda_stream"}


@built
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_kernels_keep_their_tiles_in_registers(source):
    reports = re.split(r"^(\w+\.cu)$", LIBRARY.with_suffix(".log").read_text(), flags=re.MULTILINE)
    report = dict(zip(reports[1::2], reports[2::2], strict=True))[source.name]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills, "ptxas reported on no kernel"
    assert all(pair == ("0", "0") for pair in spills), report
