# Every target works in a fresh clone: each makes what it needs, in .venv. `make help` lists them.

PYTHON ?= python3
JOBS ?= 2
GPU_PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PEERS := tests/peers/requirements.txt
CSRC := $(shell find csrc tests/cuda_shim tests/aarch64 -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Here a missing extension is a mistake; only a user's install may go on without it.
export NEXUS_REQUIRE_NATIVE := 1
# One GPU is enough to develop with; a user's install compiles for all that setup.py lists.
export NEXUS_CUDA_ARCHS ?= sm_90

.DEFAULT_GOAL := help
.PHONY: .venv help build test fuzz parity lint format bench gpu demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 picks the interpreter, GPU_PYTHON the one of make gpu, which has torch; ARGS="..." goes to pytest, fuzz.py, bench or demo.'

.venv: $(STAMP) ## make the environment
$(STAMP): pyproject.toml setup.py constraints.txt $(PEERS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt setuptools pybind11 ninja
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/python -m pip install \
		--disable-pip-version-check --no-build-isolation --no-deps --no-compile --upgrade --target .venv/peers \
		--requirement $(PEERS); fi
	@touch $@

build: $(STAMP) ## compile what changed in csrc
	@$(BIN)/python setup.py --quiet build_ext --inplace

test: build ## run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

fuzz: build ## compare random optimizers with torch in float64, for ten minutes or ARGS="--seconds 60"
	$(BIN)/python tests/fuzz.py $(ARGS)

parity: $(STAMP) ## write docs/parity.md from the tests
	$(BIN)/python tests/parity_table.py

lint: $(STAMP) ## check style, types and compiler warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	@NEXUS_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/lint

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: build ## time nexus beside torch
	$(BIN)/python -m benchmarks $(ARGS)

gpu: ## all that needs a GPU, with GPU_PYTHON: no network, no .venv, under ten minutes
	$(GPU_PYTHON) -m benchmarks.gpu

demo: build ## train a small GPT and draw its loss and rate
	$(BIN)/python examples/gpt --out build/demo $(ARGS)

clean: ## remove the environment and everything built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f nexus/_native*.so nexus/_native_*_failure.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
