# make demo   six methods, trained and compared on the embedded base
# make test   everything that a change must pass
#
# PYTHON picks the interpreter (>= 3.11) that the virtual environments are made with.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
FLOOR := .venv-floor
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# Two test processes with one thread each are faster than two that fight for the same cores.
# Tests start processes of their own, which would compile every file again where bytecode is not kept.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow test-floor lint format docs clean

help:
	@echo "make demo        train and compare six methods on the embedded base (a few minutes)"
	@echo "make test        ruff, mypy, import-linter, pytest"
	@echo "make test-slow   the tests marked slow"
	@echo "make test-floor  the tests with the oldest supported torch and transformers"
	@echo "make lint        ruff, mypy, import-linter, docs"
	@echo "make format      ruff's formatter and its safe fixes"
	@echo "make docs        write docs/cli.md and docs/data.md from the commands, check every link"
	@echo "make clean       remove environments and caches; runs/ stays"

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "spectune needs Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 2; fi
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# The stamps let an install happen only when what is installed has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing spectune into $(VENV) (the first time takes minutes)"
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing spectune and its development tools into $(VENV) (the first time takes minutes)"
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(FLOOR)/.installed-dev: pyproject.toml constraints-floor.txt
	@if [ -z "$(PYTHON)" ]; then echo "spectune needs Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 2; fi
	@$(PYTHON) -m venv $(FLOOR)
	@$(FLOOR)/bin/python $(PIP_INSTALL) -c constraints-floor.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	@$(VENV)/bin/spectune compare --quick

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python tools/make_docs.py --check

# The checks of `make lint` take one core for a minute: they run beside the tests, and are shown after them.
test: $(VENV)/.installed-dev
	@mkdir -p build; $(MAKE) --no-print-directory lint > build/lint.log 2>&1 & checks=$$!; \
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal; tests=$$?; \
	wait $$checks; checks=$$?; cat build/lint.log; \
	if [ $$checks -ne 0 ]; then echo "make lint failed" >&2; fi; \
	if [ $$tests -ne 0 ]; then echo "pytest failed" >&2; fi; \
	[ $$checks -eq 0 ] && [ $$tests -eq 0 ]

test-slow: $(VENV)/.installed-dev
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -m slow --timeout 3600

test-floor: $(FLOOR)/.installed-dev
	$(TEST_ENV) $(FLOOR)/bin/python -m pytest -n $(PYTEST_WORKERS)

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed
	$(VENV)/bin/python tools/data_page.py
	$(VENV)/bin/python tools/make_docs.py

clean:
	rm -rf $(VENV) $(FLOOR) build dist .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
