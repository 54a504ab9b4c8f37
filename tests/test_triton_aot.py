"""Every Triton kernel compiles ahead of time for Hopper (sm_90) and keeps its block in registers; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_hopper_without_register_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", Path(__file__).with_name("triton_aot.py")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = json.loads(done.stdout.splitlines()[-1])
    assert len(spills) == 18
    assert not any(spills.values()), spills
