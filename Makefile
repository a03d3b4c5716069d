# Everything a fresh machine needs: Python 3.11 or newer, make, and a package index that pip can reach.
#
#   make quickstart                                             two-core machine with a GPU-less torch on pip's index
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu     no GPU: PyTorch's own, much smaller, CPU wheels
#   make test PYTHON=/usr/bin/python3.12                        another interpreter

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Installed without what it asks for (torchvision, OpenCV, a build of torch for CUDA): our extra `lmms` has what it needs.
LMMS_EVAL ?= lmms-eval==0.7.3
OUT ?= quickstart-run
# The first interpreter that runs and is new enough; asked only when the environment has to be made.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN = $(VENV)/bin
# PyTorch's threads and pytest's two workers would fight for the same two cores.
PYTEST = OMP_NUM_THREADS=1 $(RUN)/python -m pytest

.PHONY: help venv dev quickstart test test-slow soak lint bench clean

help:
	@echo "make quickstart   install, then build, train and examine a small assistant on real images (offline, CPU)"
	@echo "make test         the fast tests"
	@echo "make test-slow    the slow tests"
	@echo "make soak         the very slow ones: runs killed at random moments, servers under load and under broken requests"
	@echo "make lint         ruff, pyright and the import floors"
	@echo "make bench        the training benchmark"
	@echo "make clean        remove the environment and the quickstart's run"

# Torch first and on its own, so that an index given for it serves nothing else.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "lapilli needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[quickstart]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps "$(LMMS_EVAL)"
	@touch $@ $(VENV)/.quickstart

venv: $(VENV)/.quickstart

dev: $(VENV)/.dev

quickstart: $(VENV)/.quickstart
	$(RUN)/lapilli quickstart --out $(OUT)

test: $(VENV)/.dev
	$(PYTEST) -n 2 -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -n 2 -m "slow and not soak"

soak: $(VENV)/.dev
	$(PYTEST) -m soak

lint: $(VENV)/.dev
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/pyright --pythonpath $(RUN)/python
	$(RUN)/lint-imports

bench: $(VENV)/.dev
	$(RUN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) $(OUT)
