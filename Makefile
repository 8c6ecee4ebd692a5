# Two commands are all the set-up there is: each makes the virtual environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Processes that test at the same time; each takes a processor and 2 GB.
WORKERS ?= 2

.PHONY: demo test test-slow test-min

demo: $(VENV)/.installed
	$(BIN)/python examples/train.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# What takes long: runs killed at eighty random moments, every recipe; about an hour.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

# The tests against the lowest version of every dependency that pyproject.toml allows.
test-min: .venv-min/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-min/bin/python -m pytest -n $(WORKERS) $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,test-trackers]"
	touch $@

.venv-min/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-min
	$(PYTHON) tests/minimum_versions.py | xargs .venv-min/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@
