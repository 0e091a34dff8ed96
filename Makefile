VENV ?= .venv
PYTHON ?= python3
WORKDIR ?= runs/digits_mosaic
# Tests that train next to nothing and start few processes.
SLOWER = end_to_end faults stages run fl server interop cli/test_signals.py \
	cli/test_own_parts.py \
	report/test_browser.py report/test_live.py test_benchmarks.py test_documentation.py test_programs.py \
	test_package.py
FAST ?= $(SLOWER:%=--ignore=tests/%)

.PHONY: run test slow check lint types docs docs-serve requirements badges faults rivals \
	ahead

run: $(VENV)/installed
	$(VENV)/bin/python launch.py --config configs/digits_mosaic.py --workdir $(WORKDIR)

test: lint types
	$(VENV)/bin/python -m pytest

# The tests that `make test` leaves out, each of which takes long.
slow: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -m slow

# What to run before each commit: lint, types and the fast tests.
check: lint types
	$(VENV)/bin/python -m pytest $(FAST)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed-test
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The documentation in site/; EXECUTE=true runs its notebooks, for minutes.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

docs-serve: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve

# requirements*.txt from pyproject.toml, where dependencies are listed.
requirements:
	$(PYTHON) -m tests.requirements

# The README's badges, from pyproject.toml and the workflows.
badges: $(VENV)/installed-test
	$(VENV)/bin/python -m tests.badges

# The long form of the tests that break things: about two hours.
faults: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 0 -s -m "slow or not slow" tests/faults

# What benchmarks measure against, each in .rivals/NAME.
rivals:
	$(PYTHON) -m benchmarks.environments

# Compilers for accelerators that are not here, in .ahead, and a small study by each.
ahead: .ahead/installed
	.ahead/bin/python -m pytest -n 0 tests/test_ahead.py

.ahead/installed: requirements-ahead.txt requirements-test.txt
	$(PYTHON) -m venv .ahead
	.ahead/bin/python -m pip install --quiet -r requirements-ahead.txt \
	  -r requirements-test.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-docs: requirements.txt requirements-docs.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

$(VENV)/installed-test: requirements.txt requirements-test.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements-test.txt
	touch $@
