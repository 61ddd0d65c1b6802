# make quickstart | test | test-all | mutants | golden | lint | docs        (PYTHON=python3.12 picks an interpreter, 3.11 or newer)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
VARIANT ?= conformal_sympow
WORKERS ?= 2

.PHONY: help quickstart test test-slow test-all mutants golden lint docs clean
help:
	@sed -n 1p Makefile

# The environment: what runs need, then what tests need besides.
$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: PYTHON=$(PYTHON) is missing or older than 3.11; use make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Train a small model on the Python sources of this machine, evaluate it at 1/16 to 8x its context, plot.
quickstart: $(VENV)/.runtime
	$(BIN)/python train.py --config=configs/quickstart.py:$(VARIANT) --workdir=$(RUN)
	$(BIN)/python eval.py --workdir=$(RUN)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --numprocesses=$(WORKERS) --dist=loadfile

test-all: test test-slow

# One-line changes of the code that the fast tests must notice: tests/mutants/table.txt.
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants.run

# What tests/test_golden.py compares with, after a change of figures or defaults that is meant.
golden: $(VENV)/.dev
	$(BIN)/python -m tests.golden.make

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation site, into build/docs/index.html.
$(VENV)-docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build

clean:
	rm -rf $(VENV) $(VENV)-docs .cache .pytest_cache .ruff_cache build *.egg-info
