"""Every Triton kernel compiles ahead of time for Hopper (sm_90) and keeps its block in registers; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
OPS = sorted(path.stem for path in (HERE / "aot").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_hopper_without_register_spills(op, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", f"aot.{op}"], cwd=HERE, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = json.loads(done.stdout.splitlines()[-1])
    assert spills
    assert not any(spills.values()), spills
