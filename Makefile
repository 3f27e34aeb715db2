# Every target sets up what it needs in $(VENV): a fresh machine with Python 3.11+ and make is enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# Of pyproject.toml, for the tests: `EXTRAS=test,triton` adds Triton (1 GB) and its tests.
EXTRAS ?= test
# Of pytest: `FLAGS=--unoptimised` compiles some programs faster, and worse.
FLAGS ?=

.PHONY: demo test lint types check bench gpu-compile clean

demo: $(VENV)/.examples
	$(BIN)/python examples/char_lm.py

test: lint types check

check: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) $(FLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

# The README's CPU step, and plans; writes examples/results/. Other figures name their command.
bench: $(VENV)/.examples
	$(BIN)/python examples/benchmarks/cpu_step.py
	$(BIN)/python examples/benchmarks/plans.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gefen_jax needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@ $(VENV)/.examples

# The kernels, and whole steps, as machine code for an H200: no GPU is needed, but Linux and 500 MB.
# What it installs lies apart: elsewhere jax would look for a GPU. The committed results have Triton's,
# too: Python 3.12 and `EXTRAS=test,triton`. The last line runs what is made for Mosaic, on a CPU.
CUDA = $(VENV)/cuda
gpu-compile: $(CUDA)/.installed
	PYTHONPATH=$(CUDA) $(BIN)/python examples/benchmarks/gpu_compile.py \
	  --ptxas $(CUDA)/nvidia/cu13/bin/ptxas
	PYTHONPATH=$(CUDA) $(BIN)/python examples/benchmarks/gpu_memory.py
	PYTHONPATH=$(CUDA) $(BIN)/python examples/benchmarks/ptx_run.py

$(CUDA)/.installed: $(VENV)/.test
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(CUDA) nvidia-cuda-nvcc \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
