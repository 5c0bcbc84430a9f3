# Everything happens in .venv, but for gpu-check and bench-gpu: those use the system's python3 with the packages it
# has, and find `headstart.*` through the links in .typing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
GPU_PYTHON := PYTHONPATH=.typing:. python3

.PHONY: gpu-python help install demo test test-slow fuzz soak lint bench gpu-check bench-gpu layouts-gpu clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(INSTALLED)  ## the pinned set, in .venv (about 7.5 GB: the registry's CUDA builds)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## 300 labelled digits, eight sources, one served model
	$(BIN)/headstart demo

test: $(INSTALLED)  ## all tests but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

WHOLE_RUNS := tests/cluster/test_cifar10_recipe.py tests/cluster/test_fit.py tests/cluster/test_pipeline.py tests/test_demo.py
test-slow: $(INSTALLED)  ## the slow tests
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu" $(addprefix --ignore=,$(WHOLE_RUNS))
	$(BIN)/python -m pytest -m "slow and not gpu" $(WHOLE_RUNS)

SECONDS_EACH ?= 60
SECONDS ?= 600
fuzz: $(INSTALLED)  ## fuzz all that reads what a client sent, guided by coverage: SECONDS_EACH=60, in turn
	$(BIN)/python -m tests.serving.fuzz --seconds $(SECONDS_EACH)

soak: $(INSTALLED)  ## ten minutes of the server under overload and faults: SECONDS=600
	$(BIN)/python -m tests.serving.soak --seconds $(SECONDS)

lint: $(INSTALLED)  ## ruff, and mypy --strict on the four rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the CPU figures, appended to benchmarks/results/
	$(BIN)/python -m benchmarks.euclidean
	$(BIN)/python -m benchmarks.energy
	$(BIN)/python -m benchmarks.mmd
	$(BIN)/python -m benchmarks.neighbours
	$(BIN)/python -m benchmarks.sinkhorn
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.textbook
	$(BIN)/python -m benchmarks.report

gpu-python:
	@python3 -c "import torch, triton, pytest, hypothesis, rich, sklearn" || { echo "this needs the system's python3 with torch, triton, pytest, hypothesis, rich and scikit-learn, as GPU images have them" >&2; exit 2; }
	@python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "no CUDA device here: run this on a machine with a GPU" >&2; exit 2; }

gpu-check: gpu-python  ## on a machine with a GPU: all tests of kernels, features and heads that need one, and a table of them last
	$(GPU_PYTHON) -m pytest tests/kernels tests/trainer/test_features.py tests/trainer/test_audition.py -m "gpu and not slow" -q -rfE --tb=short $$(python3 -c "import xdist; print('-n 6')" 2> /dev/null)

bench-gpu: gpu-python  ## on a machine with a GPU: the GPU figures, appended to benchmarks/results/
	$(GPU_PYTHON) -m benchmarks.gpu

layouts-gpu: gpu-python  ## on a machine with a GPU: layouts of the tile program beside cuBLAS's rate
	$(GPU_PYTHON) -m benchmarks.layouts

clean:  ## remove .venv, caches and builds; runs/ and the feature cache stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
