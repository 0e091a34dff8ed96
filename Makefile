VENV ?= .venv
PYTHON ?= python3
WORKDIR ?= runs/digits_mosaic

.PHONY: run test faults rivals

run: $(VENV)/installed
	$(VENV)/bin/python launch.py --config configs/digits_mosaic.py --workdir $(WORKDIR)

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

# The long form of the tests that break things: an hour.
faults: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 0 -s -m "slow or not slow" tests/faults

# What benchmarks measure against, each in .rivals/NAME.
rivals:
	$(PYTHON) -m benchmarks.environments

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements.txt requirements-test.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements-test.txt
	touch $@
