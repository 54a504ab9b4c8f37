"""Compiles the Triton kernels for sm_90 and prints the bytes of registers that each spills, as JSON.

A process of its own, because Triton decides at import whether it interprets. The arguments are specialised as a launch
on contiguous points does: stride one, pointers and D = 16, 64, ... divisible by 16.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latent_engine.kernels.triton import gmm

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
TYPES = {**dict.fromkeys(("N", "K", "D", "stride_n", "stride_d", "share"), "i32"), "labels": "*i64", "allowed": "*u8"}


def spilled_bytes(kernel, D: int, masked: bool, flag: bool, z_type: str) -> int:
    flags = dict(HAS_LABELS=masked, HAS_ALLOWED=masked, HAS_COEF=flag, WITH_LOGITS=flag, WHOLE=not flag,
                 ROUND=gmm.ROUND, stride_d=1, **gmm.blocks(D))
    constants = {p.name: flags[p.name] for p in kernel.params if p.is_constexpr or p.name == "stride_d"}
    types = {**TYPES, "z": z_type, "grad_z": z_type}
    signature = {p.name: "constexpr" if p.name in constants else types.get(p.name, "*fp32") for p in kernel.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or (name in ("D", "stride_n") and D % 16 == 0)}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": gmm.NUM_WARPS})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        report = subprocess.run([PTXAS, "-v", "-arch=sm_90a", ptx.name, "-o", "/dev/null"], capture_output=True,
                                text=True)
    assert report.returncode == 0, report.stderr
    return int(re.search(r"(\d+) bytes spill stores", report.stderr)[1])


results = {}
for D, masked, flag, z_type in ((2, False, False, "*fp32"), (7, True, False, "*bf16"), (16, False, False, "*fp32"),
                                (64, False, False, "*fp32"), (64, True, True, "*fp16"), (512, False, False, "*fp32")):
    for kernel in (gmm._forward, gmm._backward_rows, gmm._backward_components):
        name = f"{kernel.fn.__name__} D={D} masked={masked} flag={flag} {z_type}"
        results[name] = spilled_bytes(kernel, D, masked, flag, z_type)
print(json.dumps(results))
