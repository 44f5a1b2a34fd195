# Every target works in a fresh clone: each makes what it needs, in .venv. `make help` lists them.

PYTHON ?= python3
JOBS ?= 2
GPU_PYTHON ?= python3
PYTHONS ?= .venv/bin/python
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
NEXUS := .venv/.nexus
PEERS := tests/peers/requirements.txt
# In CI no test is skipped because a package is missing: tests/conftest.py sees to it.
TESTS := .venv/.test $(if $(filter 1 true,$(CI)),.venv/.lint .venv/.trainers .venv/.peers)
CSRC := $(shell find csrc tests/cuda_shim tests/aarch64 -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Here a missing extension is a mistake; only a user's install may go on without it.
export NEXUS_REQUIRE_NATIVE := 1
# One GPU is enough to develop with; a user's install compiles for all that setup.py lists.
export NEXUS_CUDA_ARCHS ?= sm_90

.DEFAULT_GOAL := help
.NOTPARALLEL:  # of pips that write to one environment
.PHONY: help build trainers test fuzz parity lint format bench gpu docs package wheels demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 picks the interpreter of a new .venv, GPU_PYTHON the one of make gpu, which has torch; ARGS="..." goes to pytest, fuzz.py, bench or demo.'

$(NEXUS): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) --group build
	$(PIP) --no-build-isolation --editable .
	@touch $@

# A group of pyproject.toml, beside nexus.
.venv/.%: $(NEXUS)
	$(PIP) --group $*
	@touch $@

# Out of the way of all imports: tests/peers finds them there.
.venv/.peers: $(PEERS) $(NEXUS)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/python -m pip install \
		--disable-pip-version-check --no-build-isolation --no-deps --no-compile --upgrade --target .venv/peers \
		--requirement $(PEERS); fi
	@touch $@

build: $(NEXUS) ## compile what changed in csrc
	@$(BIN)/python setup.py --quiet build_ext --inplace

trainers: .venv/.trainers .venv/.peers ## install what tests of trainers and of other packages need

test: build $(TESTS) ## run the tests; without `make trainers`, those of trainers are skipped
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

fuzz: build .venv/.test ## compare random optimizers with torch in float64, for ten minutes or ARGS="--seconds 60"
	$(BIN)/python tests/fuzz.py $(ARGS)

parity: build .venv/.test ## write docs/parity.md from the tests
	$(BIN)/python tests/parity_table.py

lint: .venv/.lint ## check style, types and compiler warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	@NEXUS_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/lint

format: .venv/.lint ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: build .venv/.demo ## time nexus beside torch
	$(BIN)/python -m benchmarks $(ARGS)

gpu: ## all that needs a GPU, with GPU_PYTHON: no network, no .venv, under ten minutes
	$(GPU_PYTHON) -m benchmarks.gpu

docs: .venv/.docs ## build the documentation's site in build/site; stops at the first warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: build .venv/.package ## check what would be published: metadata, sdist, the wheel of this Python
	$(BIN)/pyroma --min=10 --skip-tests=CheckManifest .
	$(BIN)/check-manifest --no-build-isolation
	rm -rf build/package build/lib*  # setuptools would ship modules that are no more
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir build/package >build/package.log 2>&1 || { cat build/package.log; false; }
	$(BIN)/twine check --strict build/package/*
	$(BIN)/auditwheel show build/package/*.whl

# For every GPU that setup.py lists.
wheels: .venv/.wheels ## build the wheels for Linux in dist, x86-64 and aarch64: PYTHONS="python3.10 python3.13"
	env --unset=NEXUS_CUDA_ARCHS $(BIN)/python release/wheels.py --python $(PYTHONS) --out dist

demo: build .venv/.demo ## train a small GPT and draw its loss and rate
	$(BIN)/python examples/gpt --out build/demo $(ARGS)

clean: ## remove the environment and everything built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f nexus/_native*.so nexus/_native_*_failure.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
