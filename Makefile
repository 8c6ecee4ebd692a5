# Two commands are all the set-up there is: each makes the virtual environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Processes that test at the same time; each takes a processor and 2 GB.
WORKERS ?= 2
# Neighbouring tests share fixtures: each worker begins with a half of them, and takes from the others when it is done.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo docs test test-slow test-benchmarks test-min

demo: $(VENV)/.installed
	$(BIN)/python examples/train.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) $(ARGS)

# The site of docs/, in build/docs; a broken link is an error. Search needs a server: python -m http.server -d build/docs
docs: $(VENV)/.extras
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What takes long: types, the demo, the notebook, runs killed at eighty random moments, every recipe.
test-slow: $(VENV)/.extras
	$(PYTEST) -m slow $(ARGS)

# The programs in benchmarks/, on small input.
test-benchmarks: $(VENV)/.installed
	$(PYTEST) -m benchmark $(ARGS)

# The tests against the lowest version of every dependency that pyproject.toml allows.
test-min: BIN = .venv-min/bin
test-min: .venv-min/.installed
	$(PYTEST) $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,test-trackers,test-quantization]"
	touch $@

# For the site, for the tests in a browser, and for that of the notebook.
$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,docs,test-demo,notebook]"
	touch $@

.venv-min/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-min
	$(PYTHON) tests/minimum_versions.py | xargs .venv-min/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@
