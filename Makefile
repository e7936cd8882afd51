# Every target is complete in itself: it sets up what it needs first. `make help` lists them.
BIN := .venv/bin
SEEDS ?= 20
KILLS ?= 8
BENCH ?= rest
ARGS ?=

.PHONY: help setup check test sim sim-mutants e2e chaos bench demo certs docs clean

help: ## print this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 14

.venv/.installed: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh

setup: .venv/.installed ## make .venv with the tested versions of everything

check: setup ## formatting, lint, types, layers, tidiness
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/pytest -q tests/test_tidy.py

test: setup ## the tests that need no network of real processes
	$(BIN)/pytest -q --ignore=tests/e2e --ignore=tests/sim/test_seeds.py

sim: setup ## whole clusters in virtual time: SEEDS=n, SEED_START=s, HOURS=h, or SEED=k to replay one
	$(BIN)/python -m tests.sim.main --seeds $(SEEDS) $(if $(SEED_START),--start $(SEED_START)) $(if $(HOURS),--hours $(HOURS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

sim-mutants: setup ## defects planted in a copy of the tree, and what catches each: ARGS='--random 200'
	$(BIN)/python -m tests.mutants.main $(ARGS)

e2e: setup ## the tutorial with real processes, certificates and sockets
	$(BIN)/pytest -q tests/e2e

chaos: setup ## real processes killed and stopped while they train: KILLS=n SEED=s
	$(BIN)/python -m tests.chaos.main --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: setup ## one figure: BENCH=placement|pace|stream|slices|outer|shaped|convergence|growth|codecs|rest|diloco
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

demo: setup ## a secured network of real processes trains a model; flags in ARGS='…'
	$(BIN)/hypha demo $(ARGS)

certs: setup ## a private CA and one certificate per role in certs/
	scripts/certs.sh

docs: setup ## regenerate docs/reference from the code
	$(BIN)/python -m scripts.reference

clean: ## remove what the targets above made
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-run hypha_p2p.egg-info
