"""Builds in place, then tests and times the ops on this machine's CUDA device: `make gpu-check PART=tests|OP|all`.

    python scripts/gpu_check.py [tests|OP|all] [--out FOLDER]

Needs Python 3.11, torch 2.11 with CUDA, Triton, numpy, setuptools, pybind11, pytest and nvcc; no network, and nothing
is installed. An op writes its timings to FOLDER/<device>-<op>.json. Exit status 0 if every part passed within its eight
minutes.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "build" / "gpu_check" / "latent_engine"
LIMIT = 480  # seconds a part, the build among them
OPS = tuple(sorted(path.stem.removeprefix("test_gpu_") for path in (ROOT / "tests").glob("test_gpu_*.py")))
TESTS = (*(f"test_{op}.py" for op in OPS), *(f"test_gpu_{op}.py" for op in OPS), "test_cuda_build.py", "test_triton_aot.py")


def device_name() -> str:
    """Name of the CUDA device; ends the program with the reason where there is none."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu-check: torch does not import: {error}.")
    if not torch.cuda.is_available():
        sys.exit(f"gpu-check: torch {torch.__version__} sees no CUDA device. Run it on a machine with a GPU and a CUDA "
                 f"build of torch; `make test` checks the kernels without one.")
    name = torch.cuda.get_device_name()
    print(f"gpu-check: {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    return name


def link_package() -> None:
    """The package as an install would lay it out, of links, so that it imports without one."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "engine").iterdir(), ROOT / "kernels", ROOT / "bench"):
        link = PACKAGE / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def commands(part: str, device: str, out: Path) -> list[list[str]]:
    """What a part runs after the build."""
    if part == "tests":
        return [["-m", "pytest", "-q", *(f"tests/{name}" for name in TESTS)]]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return [["-m", "latent_engine.bench", part, "--device", "cuda", "--json", str(out / f"{slug}-{part}.json")]]


def run(command: list[str], deadline: float) -> bool:
    """Whether `python command` succeeds before the deadline."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "LATENT_ENGINE_CUDA": "1"}
    print("gpu-check: python", *command, flush=True)
    try:
        left = max(deadline - time.monotonic(), 1)
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, timeout=left).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"gpu-check: stopped after the {LIMIT} s of its part", flush=True)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("tests", *OPS, "all"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON files")
    options = parser.parse_args()
    device = device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    link_package()
    start = time.monotonic()
    if not run(["setup.py", "-q", "build_ext", "--inplace"], start + LIMIT):
        return 1
    results = {}
    for part in ("tests", *OPS) if options.part == "all" else (options.part,):
        results[part] = all(run(command, start + LIMIT) for command in commands(part, device, options.out.resolve()))
        start = time.monotonic()
    print(f"gpu-check on {device}: " + ", ".join(f"{p} {'passed' if ok else 'FAILED'}" for p, ok in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
