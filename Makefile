# Needs Python 3.11 to 3.14. Every target first makes .venv, if it is not there or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# what `make test-soak` runs, every case of it; the signals, which take most of its time, come last
SOAK ?= tests/bench/run/test_two_drivers.py tests/bench/run/test_kills.py tests/soak \
  tests/bench/run/test_recovery.py::test_several_workers_without_shards_train_like_one
# tests in two processes: much of a test's time is waiting, for Ray to start above all
BESIDE ?= -n 2 --dist worksteal

.PHONY: run test test-slow test-soak test-oldest test-benchmark golden lint install clean

run: install
	$(BIN)/python -m bench run suites/paper_table.yaml
	@$(BIN)/python -m bench report suites/paper_table.yaml --against docs/results/digits.json \
	  --output store/reports

test: install
	$(BIN)/python -m pytest $(BESIDE) -m "not slow" --durations=12

test-slow: install
	$(BIN)/python -m pytest $(BESIDE) -m slow --durations=12

# every case; docs/results/soak.json keeps each test function's result: SOAK=tests/soak/test_signals.py
test-soak: install
	MAECT_SOAK=full $(BIN)/python -m pytest $(SOAK)

# the fast tests with the oldest versions that pyproject.toml allows; needs uv
test-oldest: install
	$(PYTHON) -m venv $(VENV)/oldest
	$(BIN)/uv pip install --quiet --compile-bytecode --resolution lowest-direct \
	  --python $(VENV)/oldest/bin/python -e '.[dev]'
	$(VENV)/oldest/bin/python -m pytest -m "not slow"

test-benchmark: install
	$(BIN)/python -m pytest --benchmark

# what the quality gate compares with, of 20 seeds of smoke.yaml; shows what has changed
golden: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/golden.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(STAMP)

# uv where it can be had, else pip. Bytecode now: every worker of Ray would else compile torch for itself
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
	  echo "needs Python 3.11 to 3.14; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -1)." \
	    "Name another one: make $(or $(MAKECMDGOALS),run) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; then \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
