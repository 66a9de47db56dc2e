# The two commands of the README are `make demo` and `make test`; both need nothing but python3 and make.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
CONSTRAINTS_VENV ?= .venv-constraints
DIST_VENV ?= .venv-dist
BIN := $(VENV)/bin
SECONDS_OF_SOAK ?= 600
GUARDS ?= 1

.PHONY: demo test lint unit fuzz bench profile soak stampede crashes constraints dist clean

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/lotusguard sandbox --demo

test: lint unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/python -m pytest

fuzz: $(VENV)/.installed
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_fuzz.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

profile: $(VENV)/.installed
	$(BIN)/python -m benchmarks.profile

# `make soak GUARDS=3`: three guards that share a Valkey.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak --seconds $(SECONDS_OF_SOAK) --guards $(GUARDS)

# 2,000 joins on 10 seats through 4 guards, 100 times; then with guards and Valkey killed meanwhile.
stampede: $(VENV)/.installed
	$(BIN)/python -m tests.soak.stampede
	$(BIN)/python -m tests.soak.stampede --faults --joins 300 --at-once 150

# Two guards over one Valkey, with crashes between any two steps.
crashes: $(VENV)/.installed
	CRASH_EXAMPLES=5000 $(BIN)/python -m pytest tests/redis/test_crashes.py

# The versions of all dependencies, as pip resolves them today. Run it before a release, test with them, and commit the file.
constraints:
	rm -rf $(CONSTRAINTS_VENV)
	$(PYTHON) -m venv $(CONSTRAINTS_VENV)
	$(CONSTRAINTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check .
	$(CONSTRAINTS_VENV)/bin/python -m pip freeze --exclude lotusguard >constraints.txt
	rm -rf $(CONSTRAINTS_VENV)

# Everything that a release consists of. The same commit gives the same bytes: the archives' times are the commit's. In the
# unpacked source archive, which has no commits, they are those of the changelog. What the tests need is not installed.
dist: $(DIST_VENV)/.installed
	rm -rf dist build
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date -r CHANGELOG.md +%s) $(DIST_VENV)/bin/python -m build
	$(DIST_VENV)/bin/twine check --strict dist/*
	cp constraints.txt dist/
	cd dist && sha256sum lotusguard-* constraints.txt >SHA256SUMS

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(CONSTRAINTS_VENV) $(DIST_VENV) build dist *.egg-info

# -e: tests use the checkout, and twistd finds the plugin.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(DIST_VENV)/.installed:
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6.0'
	touch $@

$(DEMO_VENV)/.installed: pyproject.toml $(shell find lotusguard twisted -name '*.py' 2>/dev/null)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO_VENV)/bin/python -m pip install --quiet .
	touch $@
