# Every target does its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test contracts types suite sweep test-torch check format bench gpu torture clean

run: .venv/installed                ## train the chapter's network, write its table, plot and report
	@set -e; run=runs/chapter-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/everystep train --run $$run | tail -n 3; \
	$(BIN)/everystep table $$run -o $$run/losses.html; \
	$(BIN)/everystep plot $$run -o $$run/loss.png; \
	$(BIN)/everystep report $$run -o $$run/report.html

# At once: the contracts and the types take one core each, and the suite takes two.
test: .venv/installed-dev           ## import contracts, types, and the whole test suite
	@$(MAKE) --no-print-directory -j 3 contracts types suite

contracts: .venv/installed-dev
	$(BIN)/lint-imports --no-logo

types: .venv/installed-dev
	$(BIN)/mypy

suite: .venv/installed-dev
	$(BIN)/pytest

sweep: .venv/installed-dev          ## the whole test suite with every case of its tables, which `make test` samples
	$(BIN)/pytest --sweep

# Each version takes some gigabytes, so continuous integration does not run this.
test-torch:                         ## the test suite with another torch: make test-torch VERSION=2.15.0
	@test -n "$(VERSION)" || { echo 'name a torch version: make test-torch VERSION=2.15.0' >&2; exit 2; }
	$(MAKE) .venv-torch-$(VERSION)/installed
	.venv-torch-$(VERSION)/bin/pytest --sweep

check: .venv/installed-dev          ## format and lint, then all of `make test`
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) test

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed-bench        ## everystep, the plain PyTorch loop and other frameworks, alternating
	$(BIN)/python -m benchmarks

gpu: .venv/installed-dev            ## on a machine with a GPU: its tests and what it costs there, written to gpu.md
	$(BIN)/python -m benchmarks.gpu --write gpu.md

torture: .venv/installed-dev         ## kills, signals, losses of power, full disks, readers and random input, for hours
	$(BIN)/python -m benchmarks.torture kill
	$(BIN)/python -m benchmarks.torture operations
	$(BIN)/python -m benchmarks.torture power
	$(BIN)/python -m benchmarks.torture signals
	$(BIN)/python -m benchmarks.torture readers
	@if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m benchmarks.torture disk; fi
	@if command -v strace > /dev/null; then $(BIN)/python -m benchmarks.torture slow; fi
	$(BIN)/python -m benchmarks.torture fuzz --seconds 3600
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.torture_files

clean:
	rm -rf .venv .venv-torch-* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A new pip: that of an old Python takes twice as long to choose what to install.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "everystep needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --upgrade-deps .venv

# pip would compile all that it installs, on one core; Python compiles what it imports.
.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile --editable .
	@touch $@

# For the tests, all is compiled: a warning of the compiler would fail the test that imports a module first.
# Nearly nothing is imported of these packages, which are two fifths of all and compile without warnings.
UNUSED := transformers/models|torch/_inductor|torchgen|statsmodels|mypyc?|fontTools|networkx|pygments/lexers|sympy/physics
.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x 'site-packages/(.*/tests|pip|$(UNUSED))/' .venv/lib || true
	@touch $@ .venv/installed

.venv/installed-bench: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable ".[bench]"
	@touch $@ .venv/installed

.venv-torch-%/installed: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet --editable ".[dev]" "torch==$*"
	@touch $@
