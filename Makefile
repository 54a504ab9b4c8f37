# Set-up happens once, on the first of these commands: a virtual environment in .venv with the pinned versions of
# constraints.txt, and the native libraries built in place.
#
#   make demo        train a Deep Generative Decoder on 5,000 real digits, with pictures and a micro-benchmark
#   make test        the tests                         make test-all    with the exhaustive ones
#   make check       tests and ruff                    make bench       every benchmark, to build/bench.json
#   make gpu-check   build, tests and benchmarks on a machine with a CUDA device (PART=tests, an op's name, or all)
#   make clean       remove what was built
#
# TORCH_INDEX=URL takes torch from that package index, e.g. a CPU-only one. PYTHON=path picks the interpreter.

VENV ?= .venv
BIN := $(VENV)/bin
PART ?= all
# Run each candidate: a version manager's shim can be on PATH and still not start.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test test-all check bench gpu-check clean

demo: $(VENV)/.built
	$(BIN)/python -m latent_engine.demo

# One worker a core, each with a thread: twice as fast as one process with all of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.built
	$(PYTEST)

check: test
	$(BIN)/ruff check .

bench: $(VENV)/.built
	$(BIN)/python -m latent_engine.bench --json build/bench.json

# The device machine may have no network: this runs with the Python that is there.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(PART)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.so kernels/*.log

# Debian may come without ensurepip: then pip of the system, virtualenv or uv makes the environment. The target is bin/pip
# because a failing `python -m venv` leaves a folder with bin/python behind.
$(BIN)/pip:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } \
	  || { rm -rf $(VENV); $(PYTHON) -m virtualenv -q $(VENV); } \
	  || { rm -rf $(VENV); uv venv -q --seed $(VENV); } \
	  || { rm -rf $(VENV); echo 'No way to make a virtual environment: install python3-venv, virtualenv or uv.' >&2; exit 1; }

$(VENV)/.packages: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Setting up $(VENV) (once; a few minutes, most of them the download of torch)'
	$(BIN)/python -m pip install -q -c constraints.txt 'setuptools>=77' wheel pybind11
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	LATENT_ENGINE_NATIVE=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.packages
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@
