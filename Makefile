# Each target does all of its own set-up: a virtual environment in .venv, and in it the extras that the target needs.
# A stamp file per set of extras stands for "installed", and is out of date when pyproject.toml or constraints.txt is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt

# The theme's note about another tool is not about this build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check check-all format bench bench-generalization docs clean

help:
	@echo "make demo       train two demos here and now: label noise, then a small language model (about 5 minutes)"
	@echo "make test       run the tests that are fast enough for every commit"
	@echo "make check      format, lint, types, tests, docs: what a person and CI both run before a commit lands"
	@echo "make check-all  make check, and the slow tests"
	@echo "make format     format the code and mend what the linter can mend"
	@echo "make bench      what monitoring costs: time and memory"
	@echo "make bench-generalization  how far verdicts can be trusted: three runs made anew, all tables rebuilt (5 minutes)"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      remove the environment, the built files and the caches; demo runs stay"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing logalign with its demos into $(VENV) (PyTorch is the large part) ..."
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing logalign with what its tests need into $(VENV) ..."
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing logalign with all development tools into $(VENV) ..."
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.benchmark: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing logalign with the rivals that it is compared with into $(VENV) ..."
	$(INSTALL) -e ".[benchmark]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/logalign demo label-noise
	$(BIN)/logalign demo language-model

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	$(BIN)/mkdocs build --strict --quiet

check-all: check
	$(BIN)/python -m pytest -m slow

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.detectors
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.frameworks
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.follow

bench-generalization: $(VENV)/.benchmark
	$(BIN)/python -m benchmarks.generalization subset
	$(BIN)/python -m benchmarks.generalization tables

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
