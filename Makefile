# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/falcon_like

.DEFAULT_GOAL := help
.PHONY: help install run test lint chaos curves clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install what constraints.txt pins

$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test]'
	@touch $@

run: $(INSTALLED) ## train the default recipe with a real fault in its data, and recover from it
	@# A run cut short is resumed; a finished one starts over.
	@$(BIN)/torchrun --standalone train/main.py +exp=falcon_like chaos=bad_data tracker=swanlab \
		$$(test -f $(RUN)/summary.json && echo run.overwrite=true)

test: lint ## ruff, mypy and the whole test suite
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(INSTALLED) ## real faults in real runs, half an hour: docs/reliability.md
	$(BIN)/python -m tests.chaos --output docs/reliability.md

curves: $(INSTALLED) ## measure and draw the three curves of the README
	$(BIN)/python benchmarks/recovery_curves.py --output docs/recovery.svg

clean: ## remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
