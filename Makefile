# What a developer and CI run. Each target sets up what it needs, inside the checkout.

PYTHON ?= python3
VERSION ?=
ARGS ?=

venv := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help build build-windows candidate run lint format test test-quick test-all fuzz soak bench diagram screenshots lock clean

help: ## show this text
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | sort | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-15s %s\n' "$$name" "$$text"; done

build: .venv/build.stamp ## build dist/self-update; VERSION=1.1.0 gives it another version
	@$(venv) .ci/build.py dist/self-update --version '$(VERSION)'

build-windows: .venv/build.stamp ## build dist/self-update.exe
	@$(venv) .ci/build.py dist/self-update.exe --windows --version '$(VERSION)'

candidate: .venv/build.stamp ## build VERSION=1.1.0 into upgrades/, where `make run` looks for candidates
	@test -n '$(VERSION)' || { echo 'make candidate: give a version, such as VERSION=1.1.0' >&2; exit 2; }
	@$(venv) .ci/build.py 'upgrades/self-update-$(VERSION)' --version '$(VERSION)'

run: build ## build, and run the service on localhost:8080
	@mkdir -p upgrades
	@exec dist/self-update -dev -state-dir dist/state

lint: .venv/dev.stamp ## ruff, and mypy for both platforms
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/mypy --platform win32 selfupdate .ci/build.py

format: .venv/dev.stamp ## let ruff mend what it can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

test: .venv/dev.stamp ## all tests
	@mkdir -p dist
	@.venv/bin/pytest --basetemp=dist/tests

test-quick: .venv/dev.stamp ## the tests that start no service, in seconds
	@mkdir -p dist
	@.venv/bin/pytest --basetemp=dist/tests -m 'not slow'

test-all: .venv/dev.stamp ## all tests under each Python from 3.11 to 3.14 that is here; ARGS='-m "not slow"' for pytest
	@mkdir -p dist
	@.ci/test-all $(ARGS)

fuzz: SECONDS ?= 60
fuzz: .venv/dev.stamp ## look for input that does harm, with random seeds, for SECONDS=60
	@PYTHONPATH=.:.ci:tests $(venv) tests/fuzz.py --seconds '$(SECONDS)'

soak: .venv/dev.stamp ## 200 upgrades in a row, and a table of what they cost
	@PYTHONPATH=.:.ci:tests $(venv) tests/soak.py

bench: .venv/dev.stamp .venv/bench.stamp ## measure this service beside its peers; ARGS='handover --quick', ARGS=--help
	@PYTHONPATH=.:.ci:tests $(venv) -m bench $(ARGS)

diagram: .venv/dev.stamp ## draw README's state diagram anew from the transition table
	@PYTHONPATH=. $(venv) tests/diagram.py

screenshots: .venv/dev.stamp ## take README.png, an upgrade under way, and pictures of each state into dist/screenshots
	@PYTHONPATH=.:.ci:tests $(venv) tests/screenshots.py

lock: .venv/dev.stamp ## pin the newest tools that pyproject.toml allows
	@.venv/bin/uv pip compile -q --universal --generate-hashes --upgrade --no-annotate --group build -o .ci/build.lock
	@.venv/bin/uv pip compile -q --universal --generate-hashes --upgrade --no-annotate --group dev -o .ci/dev.lock
	@.venv/bin/uv pip compile -q --universal --generate-hashes --upgrade --no-annotate --group bench -o .ci/bench.lock

clean: ## remove all that was made, and keep upgrades/
	@rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/%.stamp: .ci/%.lock .ci/venv
	@PYTHON='$(PYTHON)' .ci/venv .ci/$*.lock
	@touch $@
