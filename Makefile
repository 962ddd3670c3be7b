SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env env-latest env-llamafactory env-axolotl demo demo-megatron test test-core \
	test-latest test-llamafactory test-axolotl test-upstream matrix lint check docs bench clean

# Many processes import the same modules, so they keep what they have compiled.
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
BIN_LATEST := .venv-latest/bin
BIN_LLAMAFACTORY := .venv-llamafactory/bin
BIN_AXOLOTL := .venv-axolotl/bin
# Two test processes: the multi-process tests start more of their own. By file, because the runs that
# a file shares would else be started in both. Folder by folder, because the files of one share a
# process that has imported what they need.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=5
# Tests run on the CPU, offline, with one thread per process.
TEST_ENV := DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# Options for pytest: make test ARGS="-k boundaries"
ARGS ?=
# Rows of tests/matrix/rows.py; all of them by default.
ROWS ?=

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 15

env: .venv/.stamp ## Create .venv (Python 3.11), at exact versions
env-latest: .venv-latest/.stamp ## Create .venv-latest (newer releases), at exact versions

SOURCES := pyproject.toml scripts/make_env constraints/sources.txt constraints/vision.txt

.venv/.stamp: $(SOURCES) constraints/main.in constraints/main.txt
	@scripts/make_env main

.venv-latest/.stamp: $(SOURCES) constraints/latest.in constraints/latest.txt constraints/unresolved.txt
	@scripts/make_env latest

env-llamafactory: .venv-llamafactory/.stamp ## Create .venv-llamafactory: a small one over .venv

.venv-llamafactory/.stamp: .venv/.stamp constraints/llamafactory.txt
	@scripts/make_env llamafactory

env-axolotl: .venv-axolotl/.stamp ## Create .venv-axolotl: a small one over .venv-latest

.venv-axolotl/.stamp: .venv-latest/.stamp constraints/axolotl.txt
	@scripts/make_env axolotl

demo: env ## Train a tiny model on four channels and show their losses
	DS_ACCELERATOR=cpu $(BIN)/channel-metrics train configs/fused_data/debug.yaml

demo-megatron: env-latest ## Train in Megatron's own loop, 4 ranks (TP 2 x PP 2), with --channels
	$(TEST_ENV) PYTHONPATH=tests:. $(BIN_LATEST)/python -m megatron_lm.demo runs/demo_megatron

test: env ## Run the tests in .venv
	$(TEST_ENV) $(BIN)/python $(PYTEST) $(ARGS)

test-latest: env-latest ## Run the tests in .venv-latest
	$(TEST_ENV) $(BIN_LATEST)/python $(PYTEST) $(ARGS)

test-llamafactory: env-llamafactory ## Run the tests of LLaMA-Factory in it
	$(TEST_ENV) $(BIN_LLAMAFACTORY)/python -m pytest \
		tests/trainers/llamafactory tests/contract/test_contract_frameworks.py $(ARGS)

test-axolotl: env-axolotl ## Run the tests of Axolotl in it
	$(TEST_ENV) $(BIN_AXOLOTL)/python -m pytest \
		tests/trainers/axolotl tests/contract/test_contract_frameworks.py $(ARGS)

test-upstream: env ## Run TRL's or transformers' tests with and without our patch (TRL_PATH=...)
	$(TEST_ENV) TRL_PATH=$(TRL_PATH) TRANSFORMERS_PATH=$(TRANSFORMERS_PATH) \
		$(BIN)/python tests/upstream $(ARGS)

matrix: env ## Test older releases, installed for real; writes docs/compatibility.md (ROWS="5.6 floor")
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -m matrix $(ROWS)

lint: env ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: env ## Linters, types over the tests too, and the tests of the core
	@$(MAKE) --no-print-directory -j 2 --output-sync lint test-core

test-core: env # One process: the linters have the other core.
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow" tests/core tests/data \
		tests/test_config.py tests/test_session*.py tests/test_swap.py

docs: env ## Build the docs site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: env ## Measure what it costs, beside others; writes benchmarks/results/ and docs/benchmarks.*
	$(BIN)/python -m benchmarks

clean: ## Remove environments, caches and build products
	rm -rf .venv .venv-latest .venv-llamafactory .venv-axolotl .venv-matrix build dist site *.egg-info .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
