# `make` without a target lists the targets. Packages are installed in .venv of this clone and nowhere else.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.uv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
# Without the cache of bytecode, each process compiles torch and timm again: ten CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test slurm-tests other-tests test-slow check chaos gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/.ready  ## make the environment in .venv (with uv, which pip installs if it is missing)

.venv/.ready: pyproject.toml constraints.txt
	@command -v uv >/dev/null || $(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action ignore \
	  --target .uv uv || { echo "make: uv is missing and pip could not fetch it; try: apt-get install python3-pip"; exit 1; }
	@test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) .venv
	uv pip install --python $(BIN)/python --constraints constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## the whole path on this machine: images, shards, sweep, interruption, MLflow, scaling figure
	@$(BIN)/jepa demo

test: setup  ## all tests except the slow ones; if Slurm is installed, also those on a private Slurm
	@$(MAKE) --no-print-directory --jobs=2 --output-sync slurm-tests other-tests

test-slow: setup  ## the slow tests; run them when you change what they test
	$(BIN)/python -m pytest -m slow -n 2

# Each process of pytest-xdist runs whole groups of tests (tests/support/groups.py). Those on Slurm mostly wait.
slurm-tests: setup
	$(BIN)/python -m pytest -n 3 tests/slurm

other-tests: setup
	$(BIN)/python -m pytest -n 2 --ignore tests/slurm

check: export DENO_DIR := $(CURDIR)/.venv/deno
check: setup  ## style, types, import order, size and density, words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/deno fmt --quiet --check --line-width 100 jepa_cluster/report/static/*.js
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python .ci/density.py --check
	$(BIN)/python .ci/words.py

chaos: setup  ## N random faults on tiny trials (N=50)
	$(BIN)/python -m pytest -m chaos --chaos $(or $(N),50) tests

gpu:  ## checks and speed on a GPU, without an installation (DEVICE=cpu OUT=gpu-results)
	$(PYTHON) benchmarks/gpu.py --device $(or $(DEVICE),cuda) --out $(or $(OUT),gpu-results)

clean:  ## remove the demo's data and results; keeps .venv
	rm -rf data/demo data/demo-images jepa-root
