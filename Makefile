# `make` lists the targets. Everything runs in $(VENV), which the first target builds by itself.
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
TORCH_VERSIONS ?= 2.11 2.12 2.13 2.14 2.15

CONSTRAINTS := .ci/constraints.txt
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check
TYPED := build/typed

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench bench-gpu test-matrix clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F': +' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Build the virtual environment (every target does, when it has to)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the package and its development tools into $(VENV) ..."
	@$(RUN) $(INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Train, fold, compile and time a block-sparse network (under 5 minutes)
	$(RUN) -m examples.demo

test: $(INSTALLED)  ## Run the whole test suite
	$(RUN) -m pytest $(PYTEST_ARGS)

# mypy reads the package as installed: passes/ and codegen/ are subpackages only there.
check: $(INSTALLED)  ## Check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	@rm -rf $(TYPED)
	@$(RUN) $(INSTALL) --no-deps --no-build-isolation --target $(TYPED) .
	cd $(TYPED) && $(abspath $(RUN)) -m mypy --config-file $(abspath pyproject.toml) --cache-dir $(abspath .mypy_cache)

bench: $(INSTALLED)  ## Measure layers, models and compile time against the strongest dense baseline
	$(RUN) -m benchmarks.layers
	$(RUN) -m benchmarks.decode
	$(RUN) -m benchmarks.models
	$(RUN) -m benchmarks.compile_time
	$(RUN) -m benchmarks.training
	$(RUN) -m benchmarks.sparse_pointwise
	$(RUN) -m benchmarks.quantized
	$(RUN) -m benchmarks.break_even
	$(RUN) -m benchmarks.cost_model
	$(RUN) -m benchmarks.sensitivity
	$(RUN) -m benchmarks.never_slower
	$(RUN) -m benchmarks.periodic

bench-gpu: $(INSTALLED)  ## The same on a CUDA GPU, in under 20 minutes
	$(RUN) -m benchmarks.layers --device cuda
	$(RUN) -m benchmarks.models --device cuda

test-matrix:  ## Run the suite on every supported torch, each in its own environment
	@for version in $(TORCH_VERSIONS); do \
	  venv=.venv-torch$$version; \
	  echo "== torch $$version in $$venv"; \
	  test -x $$venv/bin/python || $(PYTHON) -m venv $$venv || exit 1; \
	  sed "s/^torch==.*/torch==$$version.*/; /^triton==/d" $(CONSTRAINTS) > $$venv/constraints.txt; \
	  $$venv/bin/python $(INSTALL) --constraint $$venv/constraints.txt --editable '.[dev]' || exit 1; \
	  $$venv/bin/python -m pytest $(PYTEST_ARGS) || exit 1; \
	done

clean:  ## Remove build outputs and caches (environments stay)
	rm -rf build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
