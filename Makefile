# `make help` lists what can be made. The first target that needs it makes .venv; a change of
# pyproject.toml or constraints.txt brings it up to date.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# Always with the constraints: a plain `torch` would fetch gigabytes of another build.
INSTALL := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e

# Threads that wait for work sleep instead of spinning: beside any other busy program, spinning costs torch
# a multiple of its speed, and gains almost nothing on an idle machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all mutants bench bench-peers docs lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## set up, build the atlas of a real sentence encoder, show its five most striking neurons
	$(RUN) examples/demo.py

test: $(VENV)/.dev ## run every test that is not slow
	$(RUN) -m pytest -m "not slow"

test-all: $(VENV)/.dev ## run every test, with many more random examples, then the benchmarks
	PATCHCLAMP_TEST_ALL=1 $(RUN) -m pytest
	$(MAKE) bench

mutants: $(VENV)/.dev ## make mistakes in the published methods and see that the tests notice
	OMP_NUM_THREADS=1 $(RUN) tests/mutants/run.py

bench: $(VENV)/.dev ## measure cost and speed side by side
	$(RUN) benchmarks/run.py

PEERS := transformer_lens nnsight pyvene

bench-peers: $(VENV)/.dev $(PEERS:%=.venv-peers/%/.made) ## measure beside other libraries, each in an environment of its own
	$(RUN) benchmarks/peers/run.py

.venv-peers/%/.made: benchmarks/peers/requirements-%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

docs: $(VENV)/.docs ## build the documentation into site/
	$(RUN) -m mkdocs build --strict

lint: $(VENV)/.dev ## check style, types and the floors
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(VENV)/bin/lint-imports

clean: ## remove what was built and all caches (.venv stays)
	rm -rf build demo-atlas dist site .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"patchclamp needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(INSTALL) ".[demo,dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(INSTALL) ".[demo,dev,docs]"
	@touch $(VENV)/.demo $(VENV)/.dev $@
