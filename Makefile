# Two commands set everything up on a machine with Python and make: `make distill` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: distill test lint types tests docs install clean

distill: install
	$(BIN)/accelerate launch train/distill.py

test: lint types tests

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

tests: install
	$(BIN)/pytest -n auto --dist worksteal

docs: $(VENV)/.docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --builder html docs build/docs

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
