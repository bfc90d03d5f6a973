# make demo and make test do all the set-up themselves; make help lists the rest.
PYTHON ?= python3
VENV ?= .venv
# A Python that has PyTorch, to measure beside in make bench.
TORCH ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo bench notebooks docs test test-all lint format clean help

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

# Goes before a slow, silent command: says every 20 seconds that it still runs.
PULSE := while sleep 20 >/dev/null 2>&1; do echo "  still at it, $$SECONDS s"; done & \
	trap "kill $$!" EXIT;

# Tests the peer with the PyTorch of another environment, which must be of the same Python.
PEER = $(BIN)/python -c 'import sys, pytest; sys.path.append(sys.argv[1]); \
	sys.exit(pytest.main(["-q", "tests/experiments/test_peer.py"]))' \
	"$$($(TORCH) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')"

demo: $(READY)  ## prune and train a small ResNet on real data, dense against DPaI against random
	@$(BIN)/python -m experiments demo

bench: $(READY)  ## time, memory and objectives of pruning, in tables; up to an hour
	@$(if $(TORCH),echo "pytest: the peer in PyTorch prunes as dpai_jax does"; $(PEER))
	@$(BIN)/python -m experiments bench $(if $(TORCH),--torch "$(TORCH)")

notebooks: $(READY)  ## run the notebooks and keep what they print and draw
	@$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

docs: $(READY)  ## make the documentation site in build/site; it needs no network
	@$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees -c docs . build/site
	@echo "Open build/site/index.html"

test: lint  ## lint, types, then all tests but the slow ones; ten minutes on two cores
	@echo "pytest: two processes"
	@$(PYTEST) -m "not slow"

test-all: lint  ## the same with the slow tests: notebooks, documents, large networks
	@echo "pytest: two processes"
	@$(PYTEST)

lint: $(READY)  ## ruff's rules, ruff's format, and types
	@echo "ruff: rules and format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "mypy: types (up to a minute the first time)"
	@$(PULSE) $(BIN)/mypy dpai_jax experiments

format: $(READY)  ## rewrite the code to ruff's format, and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment, caches and builds; results and data stay
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find dpai_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@echo "make demo | test | ...   [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A change of the pins starts from an empty environment, so that it holds nothing else.
# --clear would empty any folder: only one that venv made is offered to it.
$(PACKAGES): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: give one by PYTHON=..." >&2; exit 1; }
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then \
		echo "VENV=$(VENV) is there and is no virtual environment" >&2; exit 1; fi
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear "$(VENV)"
	@echo "Installing requirements.txt (one to three minutes)"
	@$(PULSE) $(PIP) install --quiet -r requirements.txt
	@touch $@

# The wheel holds the library alone; notebooks, which run in their own folder, import experiments/.
$(READY): $(PACKAGES) setup.cfg pyproject.toml
	@echo "Installing dpai_jax itself"
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import os, pathlib, sysconfig; \
		paths = pathlib.Path(sysconfig.get_path("purelib"), "experiments_of_dpai_jax.pth"); \
		paths.write_text(os.getcwd() + "\n")'
	@touch $@
