# Every target sets up what it needs in $(VENV): a fresh machine with Python 3.11+ and make is enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# Of pyproject.toml, for the tests: `EXTRAS=test,triton` adds Triton (1 GB) and its tests.
EXTRAS ?= test
# Of pytest: `FLAGS=--unoptimised` compiles some programs faster, and worse.
FLAGS ?=

.PHONY: demo test lint types check bench clean

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

# The README's CPU step and plans; writes examples/results/. Other figures name their command.
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

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
