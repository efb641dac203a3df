# Thin names for the commands CI and people run. Every target works in a fresh clone: the first one
# to need .venv makes it. uv is used when it is on PATH, else the venv's own pip; `make UV= test` forces pip.

PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null)
COMPOSE ?= docker compose
LOCK_FLAGS := --universal --python-version 3.11 --generate-hashes --no-header --quiet

BIN := .venv/bin
ifeq ($(strip $(UV)),)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
else
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
endif

BROWSERS := chromium chromium-browser google-chrome

.PHONY: help demo planted exhausted schedules test rfc check bench torture comparison browser compose lock dask compiled clean venv venv-dev venv-bench venv-dask venv-compiled
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: venv ## start the four daemons and run one DMA test through the shared table
	$(BIN)/qemu-shim run dmatest

test: venv-dev ## the whole test suite
	$(BIN)/python -m pytest -q -n auto --dist worksteal

planted: venv-dev ## how soon the simulator finds each planted bug (hours; goes on where it was)
	$(BIN)/python -m simulator.hunting

exhausted: venv-dev ## every interleaving of small stories, on every design (an hour; goes on where it was)
	$(BIN)/python -m simulator.exhausted

schedules: venv-dev ## what holds when no bug is planted: all stories and scenarios (an hour; goes on where it was)
	$(BIN)/python -m simulator.clean

rfc: venv-dev ## every behaviour and defect of the series, its tests, and how they ended
	@$(BIN)/python -m tests.rfc

check: venv-dev ## ruff, formatting, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv-bench ## each figure with its limit and its rivals
	$(BIN)/python -m bench

torture: venv-dev ## each process killed, stopped and starved at each of its calls: hours, goes on where it was left
	$(BIN)/python -m tests.torture --known docs/results/torture.json

comparison: venv ## all designs on all workloads, into docs/results/comparison.*
	$(BIN)/qemu-shim compare --docs docs/results

browser: ## Debian's chromium, if there is no browser: the report is tested in a real one
	@for name in $(BROWSERS); do command -v "$$name" >/dev/null && exit 0; done; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "make browser: no $(firstword $(BROWSERS)); as root: apt-get install chromium" >&2; exit 1; \
	fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium

compose: ## the same demo in four containers
	$(COMPOSE) build
	@rc=0; \
	{ $(COMPOSE) up --detach --wait --wait-timeout 180 && $(COMPOSE) run --rm -T scenario; } || \
	  { rc=$$?; $(COMPOSE) logs --no-color --tail 20; }; \
	$(COMPOSE) down --volumes --timeout 5 || rc=1; exit $$rc

lock: ## compile requirements*.in into requirements*.lock (needs uv)
	@test -n "$(UV)" || { echo "make lock: uv is not on PATH (pip install uv)" >&2; exit 1; }
	$(UV) pip compile $(LOCK_FLAGS) requirements.in -o requirements.lock
	$(UV) pip compile $(LOCK_FLAGS) requirements-dask.in -o requirements-dask.lock
	$(UV) pip compile $(LOCK_FLAGS) requirements-compiled.in -o requirements-compiled.lock
	$(UV) pip compile $(LOCK_FLAGS) requirements-dev.in -o requirements-dev.lock
	$(UV) pip compile $(LOCK_FLAGS) requirements-bench.in -o requirements-bench.lock

dask: venv-dask ## what `qemu-shim campaign --scheduler` needs, for this machine and for workers

compiled: venv-compiled ## what makes ranges of a large table fast: code that numba compiles

clean: ## remove .venv and everything generated
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A changed lock empties it, so nothing stale stays behind; each stamp says what is in it.
venv: .venv/run.stamp
venv-dev: .venv/dev.stamp
venv-bench: .venv/bench.stamp
venv-dask: .venv/dask.stamp
venv-compiled: .venv/compiled.stamp

.venv/made.stamp: requirements.lock requirements-dask.lock requirements-compiled.lock requirements-dev.lock requirements-bench.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) must be Python 3.11 or newer; say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make a virtual environment: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/run.stamp: .venv/made.stamp pyproject.toml
	$(INSTALL) --require-hashes -r requirements.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev.stamp: .venv/compiled.stamp
	$(INSTALL) --require-hashes -r requirements-dev.lock
	@touch $@

.venv/bench.stamp: .venv/compiled.stamp
	$(INSTALL) --require-hashes -r requirements-bench.lock
	@touch $@

# Compiled once here, and not by the first daemon that has a use for it.
.venv/compiled.stamp: .venv/run.stamp
	$(INSTALL) --require-hashes -r requirements-compiled.lock
	$(BIN)/python -m protocol.pt.kernels
	@touch $@

.venv/dask.stamp: .venv/run.stamp
	$(INSTALL) --require-hashes -r requirements-dask.lock
	@touch $@
