# Works on a machine with make, git and Python >= 3.11; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
DEMO := runs/demo
# More arguments for pytest: make test ARGS="-k formats -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=python3.12 chooses the Python that .venv is made with."

demo: $(VENV)/.installed ## train, predict, search, export and report on handwritten digits, in about two minutes
	$(BIN)/elastibit demo run=$(DEMO)
	@echo "Report: $(DEMO)/report.html"

test: $(VENV)/.installed-dev ## the default tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed-dev ## the tests marked slow, without those that need a GPU or a network
	$(BIN)/python -m pytest -m "slow and not gpu and not network" $(ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamps: an installation is repeated when what it is made from has changed, and only then.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing elastibit into $(VENV); the first time this fetches torch and takes some minutes"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing elastibit and the tools for tests into $(VENV); the first time this fetches torch and takes some minutes"
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Install Python >= 3.11, or name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "elastibit needs Python >= 3.11; '$(PYTHON)' is `$(PYTHON) -V 2>&1`. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv. Or name another: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
