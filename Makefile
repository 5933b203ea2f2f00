# The front door: `make demo` shows what Ratoon does, `make test` tests all of it.
# Both set up what they need, and are quick the second time.

.PHONY: help setup setup-dev demo test test-fast test-debian13 soak lint bench clean clean-sources
.DEFAULT_GOAL := help

PYTHON_IN_VENV := .venv/bin/python
# As many tests at once as there are processors; those of one module one after another.
AT_ONCE := -n auto --maxprocesses 4 --dist loadfile

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/' | expand -t 20

setup:  ## make .venv with Ratoon in it, and run `ratoon setup`
	@scripts/setup.sh

setup-dev:  ## the same, and what tests and benches need
	@scripts/setup.sh dev

demo: setup  ## build a chain of snapshots, fork from each, probe and measure
	@$(PYTHON_IN_VENV) -m ratoon.bench.demo

test: setup-dev lint  ## everything: style, types, fast tests, real virtual machines
	@$(PYTHON_IN_VENV) -m pytest $(AT_ONCE)

test-fast: setup-dev  ## the tests without virtual machines
	@$(PYTHON_IN_VENV) -m pytest -m 'not vm' $(AT_ONCE)

soak: setup-dev  ## the long runs, of which `make test` takes a seeded slice
	@$(PYTHON_IN_VENV) -m pytest --soak tests/faults tests/model tests/vm/test_random_lives.py \
		tests/vm/test_random_resets.py tests/vm/test_streams_across_branches.py tests/vm/test_taken_over.py \
		tests/vm/test_daemon_fuzz.py tests/vm/test_daemon_load.py tests/vm/test_daemon_kills.py \
		tests/vm/test_images_in_guests.py tests/vm/test_programs.py \
		tests/vm/test_projects_in_guests.py tests/vm/test_rebirth_recipes.py tests/users

test-debian13: setup-dev  ## the tests on machines on Debian 13, as root and as an ordinary user
	@$(PYTHON_IN_VENV) tests/on_debian13.py root -- $(AT_ONCE) tests/vm
	@$(PYTHON_IN_VENV) tests/on_debian13.py 65535 -- $(AT_ONCE) tests/vm

lint: setup-dev  ## formatter, linter and type checker
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy --no-error-summary
	@MYPYPATH=tests/vm .venv/bin/mypy --no-error-summary tests/vm/conftest.py

bench: setup-dev  ## all benches, half an hour; every sample as CSV and JSON in build/bench
	@.venv/bin/ratoon bench all

clean-sources:  ## have apt take nothing from Debian's backports for Ratoon any more
	@if [ "$$(id -u)" -eq 0 ]; then sh src/ratoon/machine/host/backports.sh remove; else sudo sh src/ratoon/machine/host/backports.sh remove; fi

clean:  ## remove what was built in the checkout; the cache outside stays
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
