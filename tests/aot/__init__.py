"""Ahead-of-time compilation of Triton kernels for sm_90; each file prints the bytes of registers that its kernels spill.

Processes of their own (`python -m aot.<op>` in tests/), because Triton decides at import whether it interprets.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def spilled_bytes(kernel: triton.JITFunction, constants: dict, types: dict[str, str], aligned: set[str],
                  num_warps: int) -> int:
    """Bytes of spill stores of `kernel`, specialised as a launch does.

    Args:
        constants: values of the constexpr parameters, and of those that a launch specialises to a constant.
        types: Triton's type of the other parameters; "*fp32" where not given.
        aligned: names of the parameters divisible by 16; pointers are.
    """
    constants = {p.name: constants[p.name] for p in kernel.params if p.is_constexpr or p.name in constants}
    signature = {p.name: "constexpr" if p.name in constants else types.get(p.name, "*fp32") for p in kernel.params}
    divisible = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
                 if kind.startswith("*") or (name in aligned and kind != "constexpr")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, divisible), target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        report = subprocess.run([PTXAS, "-v", "-arch=sm_90a", ptx.name, "-o", "/dev/null"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return int(re.search(r"(\d+) bytes spill stores", report.stderr)[1])
